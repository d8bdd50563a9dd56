"""Models through `prefpipe score` and `prefpipe train`: every one is computed as by transformers, or refused with the
reason, as docs/models.md says. A sample here; `make zoo` takes every model."""

import os
from pathlib import Path

import pytest
import transformers

from tests.conftest import Call
from tests.zoo import cases, page
from tests.zoo.outcomes import Outcome

ALL = "PREFPIPE_ALL_MODELS" in os.environ
TEXT = page.PAGE.read_text(encoding="utf-8")
STATED = page.read(TEXT)
# Quick ones of each kind: shared, separate, refused.
QUICK = (
    *("gpt2-dialogpt-small", "mistral-7b-instruct-v0.3", "phi-3.5-mini-instruct", "olmo-2-7b-instruct"),
    *("chatglm3-6b", "falcon-40b", "qwen-7b-chat", "minicpm3-4b", "granite-docling-258m"),
    *("gemma3_text", "gptj", "mpt", "bart", "roberta", "xlnet"),
)
pytestmark = pytest.mark.filterwarnings("default")


def sampled(names: list[str]) -> list[object]:
    """Every model with `make zoo`; else the quick ones."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in names if ALL or name in QUICK
    ]


@pytest.mark.parametrize("name", sampled(cases.every_name()))
def test_a_model_of_the_hub(name: str, tmp_path: Path, call: Call) -> None:
    found = page.tried(name, tmp_path, call)
    assert found == STATED[page.HUB][name], f"python -m tests.zoo.page {name} writes what is so now"


@pytest.mark.parametrize("name", sampled(page.architectures()))
def test_an_architecture(name: str, tmp_path: Path, call: Call) -> None:
    found = page.tried(name, tmp_path, call)
    assert found == STATED[page.ARCHITECTURES][name], f"python -m tests.zoo.page {name} writes what is so now"


def test_the_page_is_about_every_architecture_of_this_transformers() -> None:
    assert f"transformers {transformers.__version__}" in TEXT
    assert sorted(STATED[page.ARCHITECTURES]) == sorted(page.architectures())


@pytest.mark.skipif(not cases.CORPUS.is_dir(), reason="the corpus of models is not here")
def test_the_page_is_about_every_model_of_the_corpus() -> None:
    assert sorted(STATED[page.HUB]) == cases.every_name()


def test_nothing_differs_and_nothing_crashes() -> None:
    kinds = {found.kind for part in STATED.values() for found in part.values()}
    assert kinds == {"shared", "separate", "refused", "not tried"}


def test_the_page_is_read_as_it_is_written() -> None:
    assert page.written(STATED) == TEXT
    one = {page.HUB: {"a-b": Outcome("refused", "it | is", "ask")}, page.ARCHITECTURES: {}}
    assert "| `a-b` | it" in page.written(one)
