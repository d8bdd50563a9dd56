"""The real vLLM engine in the process of the tests, on the tiny model in fp32, against the transformers engine.

The engines start one after the other, so fixtures gather what an engine gives and close it; the tests look at that.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path

import pytest
import torch

from prefpipe import engines
from prefpipe.engines.base import Draw, Engine, EngineSettings, Request, Sample, ScoreRequest
from prefpipe.forward.load import adapter_tensors, add_lora, load_model, save_adapter
from prefpipe.models.chat import Chat, load_chat
from prefpipe.models.encoding import encode
from prefpipe.models.policy import resolve
from tests.engines.cases import distance

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]  # vLLM's own warnings are not ours to fix

MAX_TOKENS, MAX_NUM_SEQS = 20, 4
DRAWS = (Draw(0, 0, 0.0), Draw(1, 11, 1.0), Draw(2, 12, 0.7))
Samples = dict[str, list[Sample]]
Logps = dict[str, list[float]]


@dataclass(frozen=True)
class Facts:
    """What one engine gave: samples, the same requests again in reverse order, and scores of the first samples, with
    the adapter, without it, and of every other token."""

    first: Samples
    again: Samples
    scored: Logps
    base: Logps
    masked: Logps
    scorer: str


@pytest.fixture(scope="module")
def settings(tiny_model: Path) -> EngineSettings:
    """Room for the longest prompt and a full completion, to the token."""
    chat = load_chat(tiny_model)
    longest = max(len(r.prompt_token_ids) for r in requests(chat))
    policy = resolve(str(tiny_model))
    return EngineSettings(policy, chat, "float32", 0.8, MAX_TOKENS, longest + MAX_TOKENS, MAX_NUM_SEQS, 64)


@pytest.fixture(scope="module")
def tuned(settings: EngineSettings, tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    """The settings with a LoRA adapter that changes the model: B is not zero."""
    directory = tmp_path_factory.mktemp("adapter")
    base = settings.policy.directory
    model = add_lora(load_model(base, "float32"), r=4, alpha=8, target_modules="all-linear", seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    save_adapter(model, adapter_tensors(model), directory, "tiny")
    return replace(settings, policy=resolve(str(base), str(directory)))


@pytest.fixture(scope="module")
def plain(settings: EngineSettings) -> Facts:
    given = requests(settings.chat)
    with engines.load("vllm", settings) as engine:
        first = collect(engine, given)
        to_score = sequences(settings.chat, first)
        return Facts(
            first=first,
            again=collect(engine, reversed(given)),
            scored=dict(engine.score(to_score, adapter=True)),
            base=dict(engine.score(to_score, adapter=False)),
            masked=dict(engine.score((replace(s, loss_mask=every_other(s.token_ids)) for s in to_score), adapter=True)),
            scorer=engine.scorer,
        )


@pytest.fixture(scope="module")
def adapted(tuned: EngineSettings) -> Samples:
    with engines.load("vllm", tuned) as engine:
        return collect(engine, requests(tuned.chat))


def requests(chat: Chat) -> list[Request]:
    """30 requests of 3 draws: more than ten windows of 2 * MAX_NUM_SEQS draws, with prompts of many lengths."""
    return [Request(f"p{n}", encode(chat, f"bird {n}" + "!" * n), DRAWS) for n in range(30)]


def sequences(chat: Chat, samples: Samples) -> list[ScoreRequest]:
    prompts = {r.prompt_id: r.prompt_token_ids for r in requests(chat)}
    return [
        ScoreRequest(f"{name}/{s.sample_index}", prompts[name], s.token_ids)
        for name, own in samples.items()
        for s in own
    ]


def every_other(token_ids: Sequence[object]) -> list[bool]:
    return [(len(token_ids) - 1 - place) % 2 == 0 for place in range(len(token_ids))]


def collect(engine: Engine, given: Iterable[Request]) -> Samples:
    found: Samples = {}
    for request, samples in engine.generate(given):
        assert request.prompt_id not in found
        found[request.prompt_id] = samples
    return found


def reference(settings: EngineSettings, samples: Samples, *, adapter: bool) -> Logps:
    """The transformers engine's own scores of the same ids."""
    with engines.load("transformers", settings) as engine:
        return dict(engine.score(sequences(settings.chat, samples), adapter=adapter))


def captured(samples: Samples) -> Logps:
    return {f"{name}/{s.sample_index}": s.token_logps for name, own in samples.items() for s in own}


def token_ids(samples: Samples) -> dict[str, list[list[int]]]:
    return {name: [s.token_ids for s in own] for name, own in samples.items()}


def test_an_engine_that_takes_another_policy_gives_what_a_new_one_gives(
    plain: Facts, adapted: Samples, settings: EngineSettings, tuned: EngineSettings
) -> None:
    """Room for adapters changes nothing without one; an adapter that does not fit into it is refused."""
    given = requests(settings.chat)
    with engines.load("vllm", replace(settings, lora_rank=4)) as engine:
        without = collect(engine, given)
        assert engine.take(tuned.policy)
        with_it = collect(engine, given)
        assert engine.take(settings.policy)
        assert collect(engine, given) == without
        assert engine.take(tuned.policy)
        assert collect(engine, given) == with_it
    assert without == plain.first
    assert with_it == adapted


def test_every_draw_comes_back_once(plain: Facts, settings: EngineSettings) -> None:
    assert set(plain.first) == {r.prompt_id for r in requests(settings.chat)}
    assert all([s.sample_index for s in own] == [0, 1, 2] for own in plain.first.values())


def test_samples_end_rightly(plain: Facts) -> None:
    """stop: the end is the last id and the only one; length: MAX_TOKENS ids without an end. Both happen."""
    samples = [s for own in plain.first.values() for s in own]
    assert {s.finish_reason for s in samples} == {"stop", "length"}
    for s in samples:
        assert len(s.token_logps) == len(s.token_ids)
        if s.finish_reason == "stop":
            assert s.token_ids.index(2) == len(s.token_ids) - 1
        else:
            assert len(s.token_ids) == MAX_TOKENS
            assert 2 not in s.token_ids


def test_a_seed_gives_the_same_ids_in_another_order(plain: Facts) -> None:
    assert token_ids(plain.again) == token_ids(plain.first)
    assert distance(captured(plain.again), captured(plain.first)) < 1e-3


def test_draws_differ(plain: Facts) -> None:
    """Draw 0 is greedy, 1 and 2 have seeds of their own."""
    assert sum(len({tuple(s.token_ids) for s in own}) == 3 for own in plain.first.values()) > 25


def test_log_probs_are_raw_whatever_temperature_and_top_p(plain: Facts, settings: EngineSettings) -> None:
    """Captured, scored again, and scored by transformers: within 1e-3 nat per token; draw 2 has temperature 0.7."""
    truth = reference(settings, plain.first, adapter=True)
    assert distance(captured(plain.first), truth) < 1e-3
    assert distance(plain.scored, captured(plain.first)) < 1e-3
    assert distance(plain.base, plain.scored) < 1e-3


def test_with_a_mask_the_values_are_those_of_the_scored_tokens(plain: Facts) -> None:
    expected = {key: list(compress(values, every_other(values))) for key, values in plain.scored.items()}
    assert plain.masked.keys() == expected.keys()
    assert distance(plain.masked, expected) < 1e-4


def test_the_scorer_names_engine_version_and_dtype(plain: Facts) -> None:
    assert plain.scorer.startswith("vllm-")
    assert plain.scorer.endswith("/float32")


def test_the_adapter_is_applied_when_sampling(adapted: Samples, plain: Facts, tuned: EngineSettings) -> None:
    assert distance(captured(adapted), reference(tuned, adapted, adapter=True)) < 2e-3
    assert adapted != plain.first


def test_scoring_switches_the_adapter_on_and_off(
    adapted: Samples, settings: EngineSettings, tuned: EngineSettings
) -> None:
    """adapter=False gives the values of the model without any adapter, far from those with it, in any order."""
    given = sequences(tuned.chat, adapted)
    with engines.load("vllm", tuned) as engine:
        off = dict(engine.score(given, adapter=False))
        on = dict(engine.score(given, adapter=True))
        off_again = dict(engine.score(given, adapter=False))
    assert distance(on, reference(tuned, adapted, adapter=True)) < 2e-3
    assert distance(off, reference(settings, adapted, adapter=False)) < 2e-3
    assert distance(off_again, off) < 1e-3
    assert distance(on, off) > 0.1


def test_scoring_while_sampling_goes_on_disturbs_neither(settings: EngineSettings, plain: Facts) -> None:
    """A stage scores a committed shard while the next prompts are in the engine."""
    scored: Logps = {}
    found: Samples = {}
    with engines.load("vllm", settings) as engine:
        for request, samples in engine.generate(requests(settings.chat)):
            found[request.prompt_id] = samples
            scored.update(engine.score(sequences(settings.chat, {request.prompt_id: samples}), adapter=False))
    assert token_ids(found) == token_ids(plain.first)
    assert distance(scored, plain.base) < 1e-3


def test_the_base_is_scored_while_the_adapter_samples(
    tuned: EngineSettings, settings: EngineSettings, adapted: Samples
) -> None:
    """`--reference base` with an adapter: what a round of `iterate --reference base` does."""
    base: Logps = {}
    found: Samples = {}
    with engines.load("vllm", tuned) as engine:
        for request, samples in engine.generate(requests(tuned.chat)):
            found[request.prompt_id] = samples
            base.update(engine.score(sequences(tuned.chat, {request.prompt_id: samples}), adapter=False))
    assert token_ids(found) == token_ids(adapted)
    assert distance(base, reference(settings, adapted, adapter=False)) < 2e-3


def test_every_way_to_narrow_sampling_reaches_vllm(settings: EngineSettings) -> None:
    """top_k = 1, and min_p = 1, are greedy whatever the temperature; a stop token ends a completion and stays in it."""
    given = requests(settings.chat)[:4]
    hot = [replace(r, draws=(Draw(0, 5, 1.5),)) for r in given]
    greedy = [replace(r, draws=(Draw(0, 0, 0.0),)) for r in given]
    with engines.load("vllm", settings) as engine:
        expected = token_ids(collect(engine, greedy))
        free = token_ids(collect(engine, hot))
    stop = next(ids[0][1] for ids in expected.values() if len(ids[0]) > 2)
    narrowed = {}
    for name, changes in (("top_k", {"top_k": 1}), ("min_p", {"min_p": 1.0}), ("stop", {"stop_token_ids": (stop,)})):
        with engines.load("vllm", replace(settings, top_p=1.0, **changes)) as engine:
            narrowed[name] = collect(engine, greedy if name == "stop" else hot)
    assert token_ids(narrowed["top_k"]) == token_ids(narrowed["min_p"]) == expected != free
    for name, own in narrowed["stop"].items():
        whole = expected[name][0]
        cut = whole[: whole.index(stop) + 1] if stop in whole else whole
        assert own[0].token_ids == cut
        assert own[0].finish_reason == ("stop" if stop in whole or whole[-1] == 2 else "length")


def test_scores_do_not_depend_on_the_token_budget_of_a_pass(settings: EngineSettings, plain: Facts) -> None:
    """Chunks of 16 tokens: the buffers of a pass stay small, the values are the same to float noise."""
    with engines.load("vllm", replace(settings, max_tokens_per_batch=16)) as engine:
        chunked = dict(engine.score(sequences(settings.chat, plain.first), adapter=True))
    assert distance(chunked, plain.scored) < 1e-4
