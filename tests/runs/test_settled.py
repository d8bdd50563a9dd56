"""`dtype = "auto"` is a number type before anything is hashed, and a run keeps the one that it began with."""

from pathlib import Path

import pytest

from prefpipe import machine
from prefpipe.config.generate import GenerateConfig
from prefpipe.config.iterate import IterateConfig
from prefpipe.config.train import TrainConfig
from prefpipe.runs import store
from prefpipe.runs.settled import settled


def on(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(machine, "number_type", lambda: (dtype, "of this test"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_auto_is_that_of_the_machine_in_every_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    on(monkeypatch, dtype)
    rounds = settled(IterateConfig(train=TrainConfig(dtype="float16")))
    assert (rounds.generate.dtype, rounds.train.dtype, rounds.evaluate.dtype) == (dtype, "float16", dtype)
    assert f"dtype = {dtype}: of this test" in capsys.readouterr().err


def test_a_server_is_taken_to_compute_in_bfloat16_whatever_this_machine_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on(monkeypatch, "float32")
    far = GenerateConfig(engine="server", base_urls=("http://there:8000",))
    assert settled(far).dtype == "bfloat16"
    assert "dtype = bfloat16: servers are taken to compute in it" in capsys.readouterr().err
    rounds = settled(IterateConfig(generate=far))
    assert (rounds.generate.dtype, rounds.evaluate.dtype) == ("bfloat16", "float32")


def test_auto_in_a_table_of_rewards_is_that_of_the_machine_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Reward models and judges; a run that goes on keeps theirs, and a number type that is named stays."""
    config = GenerateConfig(
        reward_settings={
            "rm": {"kind": "reward_model", "model": "m"},
            "verdict": {"kind": "judge", "engine": "vllm", "model": "m", "dtype": "float16"},
            "short": {"kind": "length", "max": 9},
        }
    )

    def types(out: Path) -> list[str | None]:
        tables = settled(config, out).reward_settings.values()
        return [getattr(table, "dtype", None) for table in tables]

    on(monkeypatch, "bfloat16")
    assert types(tmp_path) == ["bfloat16", "float16", None]
    with store.open_run(tmp_path, "generate", settled(config, tmp_path), {}, force=False):
        pass
    on(monkeypatch, "float32")
    assert types(tmp_path) == ["bfloat16", "float16", None]
    assert types(tmp_path / "other") == ["float32", "float16", None]


def test_a_number_type_that_is_named_is_kept_and_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on(monkeypatch, "bfloat16")
    config = GenerateConfig(dtype="float32")
    assert settled(config) == config
    assert capsys.readouterr().err == ""


def test_a_run_goes_on_with_the_number_type_that_it_began_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on(monkeypatch, "bfloat16")
    with store.open_run(tmp_path, "generate", settled(GenerateConfig(), tmp_path), {}, force=False):
        pass
    on(monkeypatch, "float32")
    assert settled(GenerateConfig(), tmp_path).dtype == "bfloat16"
    with store.open_run(tmp_path, "generate", settled(GenerateConfig(), tmp_path), {}, force=False):
        pass
    assert settled(GenerateConfig(), tmp_path / "other").dtype == "float32"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"config": 3}', '{"command": "x", "config": {"dtype": 7}, "identity": {}}']
)
def test_a_damaged_config_leaves_it_to_the_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str
) -> None:
    on(monkeypatch, "float32")
    (tmp_path / "config.json").write_text(content)
    assert settled(GenerateConfig(), tmp_path).dtype == "float32"
