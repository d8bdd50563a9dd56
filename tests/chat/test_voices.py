"""Answers of base and policy are those of `generate`, and a conversation has turns."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefpipe.chat.settings import Settings
from prefpipe.chat.voices import Voice, voices
from prefpipe.config.generate import GenerateConfig
from prefpipe.errors import Interrupted, RowFault, UsageError
from prefpipe.runs import store
from prefpipe.schemas import Completion, from_table
from prefpipe.stages.generate import stage as generate
from prefpipe.stages.train import stage
from tests.conftest import Write
from tests.stages.train import data

pytestmark = pytest.mark.slow
SETTINGS = Settings(seed=5, temperature=1.0, max_tokens=12)


@pytest.fixture(scope="module")
def both(trained: Path) -> Iterator[list[Voice]]:
    with voices(trained) as loaded:
        yield loaded


@pytest.fixture(autouse=True)
def _forgotten(both: list[Voice]) -> None:
    for voice in both:
        voice.messages = []


def said(voice: Voice, question: str, settings: Settings = SETTINGS) -> str:
    texts: list[str] = []
    voice.answer(question, settings, texts.append)
    assert len(texts) > 1  # it came in pieces
    return "".join(texts)


def generated(model: Path, out: Path, prompts: Path, adapter: str) -> str:
    """The first sample of `generate` with the settings above."""
    config = GenerateConfig(
        model=str(model), adapter=adapter, prompts=str(prompts), engine="transformers", dtype="float32", seed=5,
        temperature=1.0, max_tokens=12, num_samples=1, check=0, split="all",
    )  # fmt: skip
    generate.run(config, out, force=False)
    (row,) = from_table(Completion, store.read_dataset(out, "completions", Completion))
    return row.text


def test_an_answer_is_that_of_generate_with_and_without_the_adapter(
    both: list[Voice], trained: Path, tiny_model: Path, tmp_path: Path, write: Write
) -> None:
    prompts = write({"prompt": "Tell me about owls."})
    base, policy = both
    assert [voice.name for voice in both] == ["base", "policy"]
    assert said(policy, "Tell me about owls.") == generated(
        tiny_model, tmp_path / "p", prompts, str(trained / "adapter")
    )
    assert said(base, "Tell me about owls.") == generated(tiny_model, tmp_path / "b", prompts, "none")


def test_the_next_turn_follows_the_answer_and_the_seed_decides(
    both: list[Voice], trained: Path, tiny_model: Path, tmp_path: Path, write: Write
) -> None:
    _, policy = both
    first = said(policy, "Owls?")
    second = said(policy, "More.")
    turns = [("user", "Owls?"), ("assistant", first), ("user", "More.")]
    prompts = write({"messages": [{"role": role, "content": text} for role, text in turns]})
    assert second == generated(tiny_model, tmp_path / "g", prompts, str(trained / "adapter"))
    policy.messages = []
    assert said(policy, "Owls?") == first
    policy.messages = []
    assert said(policy, "Owls?", Settings(seed=6, temperature=1.0, max_tokens=12)) != first


def test_what_is_interrupted_counts_and_the_adapter_is_on_again(both: list[Voice]) -> None:
    base, policy = both
    whole = said(policy, "Owls?")
    policy.messages = []
    heard: list[str] = []

    def stop(text: str) -> None:
        heard.append(text)
        if len(heard) == 3:
            raise Interrupted(signal.SIGINT)

    with pytest.raises(Interrupted):
        base.answer("Owls?", SETTINGS, stop)
    assert base.messages[-1]["content"] == "".join(heard)
    assert said(policy, "Owls?") == whole


def test_a_question_that_is_too_long_is_forgotten(both: list[Voice]) -> None:
    with pytest.raises(RowFault, match="too_long"):
        both[1].answer("long " * 400, SETTINGS, print)
    assert both[1].messages == []


def test_a_run_that_trained_every_weight_is_two_models(tiny_model: Path, tmp_path: Path) -> None:
    pairs = data.write_pairs(tmp_path / "p", data.bare_pairs(4))
    settings = data.config(tiny_model, pairs, tuning="full", lora_r=16, lora_alpha=32, learning_rate=1e-2)
    stage.run(settings, tmp_path / "t", force=False)
    greedy = Settings(temperature=0.0, max_tokens=12)
    with voices(tmp_path / "t") as (base, policy):
        assert base.engine is not policy.engine
        assert said(base, "Owls?", greedy) != said(policy, "Owls?", greedy)


def test_a_run_without_a_policy_is_refused(trained: Path) -> None:
    with pytest.raises(UsageError, match="is a run of build-pairs"), voices(trained.parent / "p"):
        pass
