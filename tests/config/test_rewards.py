"""Settings of rewards: kinds, tables, and what they refuse."""

import dataclasses
import re
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from prefpipe.config.base import Config, fields, load
from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.generate import GenerateConfig
from prefpipe.config.rewards import KINDS, Keyword, Length, Refusal, settings_of
from prefpipe.config.score import ScoreConfig
from prefpipe.engines.base import EngineSettings
from prefpipe.errors import UsageError
from tests.conftest import ROOT


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_is_documented_and_read_by_a_reward(kind: str) -> None:
    cls = KINDS[kind]
    assert issubclass(cls, Config)
    package = ROOT / "prefpipe"
    code = "\n".join(p.read_text() for p in [*(package / "rewards").glob("*.py"), package / "models/encoding.py"])
    of_engines = (
        {field.name for field in dataclasses.fields(EngineSettings)} if kind == "judge" else set()
    )  # all at once
    assert re.search(r"EngineSettings\.of\(\s*settings,", code)
    for name, field in fields(cls):
        if name != "kind":
            is_read = re.search(rf"settings\.{name}\b", code) or name in of_engines
            assert is_read, f"{kind}.{name} is documented but never used"
            assert (field.description or "").endswith("."), f"{kind}.{name}"
    assert cls().model_dump()["kind"] == kind  # usable with its defaults


def test_a_name_is_a_table_or_a_kind_with_its_defaults() -> None:
    mine = Length(max=3)
    assert settings_of("mine", {"mine": mine}) is mine
    assert settings_of("length", {"length": mine}) is mine
    assert settings_of("length", {}) == Length()
    with pytest.raises(KeyError):
        settings_of("module:function", {})


@pytest.mark.parametrize(
    ("cls", "values", "words"),
    [
        (Length, {"min": 3, "max": 2}, "min = 3 is more than max = 2"),
        (Length, {"max": 0}, "greater than or equal to 1"),
        (Keyword, {"all": "owl"}, "valid tuple"),
        (Refusal, {"prefer": "both"}, "'answer' or 'refusal'"),
    ],
)
def test_what_is_refused(cls: type[BaseModel], values: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        cls(**values)


def test_names_of_rewards_are_checked_against_tables_and_kinds() -> None:
    tables = {"mine": {"kind": "length"}}
    assert (
        GenerateConfig.model_validate({"reward_settings": tables, "rewards": ["mine", "math", "m:f"]}).rewards[0]
        == "mine"
    )
    assert EvaluateConfig.model_validate({"reward_settings": tables, "reward": "mine"}).reward == ("mine",)
    with pytest.raises(ValidationError, match=r"no such reward \(did you mean 'mine'\?\)"):
        GenerateConfig.model_validate({"reward_settings": tables, "rewards": ["mien"]})
    with pytest.raises(ValidationError, match="1 validation error"):  # the table's own error is said alone
        GenerateConfig.model_validate({"reward_settings": {"mine": {"kind": "no"}}, "rewards": ["mine"]})
    with pytest.raises(ValidationError, match=r"must have kind = \"length\""):
        GenerateConfig.model_validate({"reward_settings": {"length": {"kind": "math"}}})


def test_the_name_of_imported_ratings_is_taken() -> None:
    with pytest.raises(UsageError, match="imports"):
        load(GenerateConfig, None, {"reward_settings": '{"rating": {"kind": "length"}}', "rewards": ["rating"]})


@pytest.mark.parametrize(
    ("cls", "values", "refused"),
    [
        (GenerateConfig, {"rewards": ("j",)}, "1.7 of"),
        (GenerateConfig, {"rewards": ("j", "rm"), "engine": "fake"}, "1.7 of"),
        (GenerateConfig, {"rewards": ("j",), "engine": "transformers", "check": 0}, ""),
        (GenerateConfig, {"rewards": ("j",), "engine": "transformers"}, "1.7 of"),
        (GenerateConfig, {"rewards": ("j",), "gpu_memory_utilization": 0.15}, ""),
        (GenerateConfig, {"rewards": ("length", "m:f")}, ""),
        (EvaluateConfig, {"reward": "rm"}, "0.85 for reward rm"),
        (EvaluateConfig, {"reward": "length"}, ""),
        (ScoreConfig, {"rewards": ("j",)}, "1.7 of"),
        (ScoreConfig, {"rewards": ("j",), "reference": "none"}, ""),
        (ScoreConfig, {"rewards": ("j",), "engine": "transformers"}, "1.7 of"),  # 32 rows are checked with vLLM
        (ScoreConfig, {"rewards": ("j",), "engine": "transformers", "check": 0}, ""),
    ],
)
def test_engines_with_vllm_must_fit_on_one_gpu(cls: type[BaseModel], values: dict[str, Any], refused: str) -> None:
    """Each takes 0.85 of it by default; a table that no reward names takes nothing."""
    tables = {
        "j": {"kind": "judge", "engine": "vllm", "model": "m"},
        "rm": {"kind": "reward_model", "engine": "vllm", "model": "m"},
    }
    if not refused:
        load(cls, None, {"reward_settings": tables, **values})
        return
    with pytest.raises(UsageError, match=re.escape(refused)) as caught:
        load(cls, None, {"reward_settings": tables, **values})
    assert "at most 1 together" in caught.value.message
