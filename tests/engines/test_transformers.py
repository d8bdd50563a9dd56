"""The transformers engine on the tiny model in fp32: its samples and log-probs against transformers' own."""

import json
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GenerationConfig, Qwen2MoeConfig

from prefpipe import engines
from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.config.generate import GenerateConfig
from prefpipe.config.train import TrainConfig
from prefpipe.engines.base import Draw, Engine, EngineSettings, Query, Request, Sample, ScoreRequest
from prefpipe.errors import UsageError
from prefpipe.forward.layout import Tree
from prefpipe.forward.load import adapter_tensors, add_lora, load_model, save_adapter, scorer_name
from prefpipe.forward.logps import TreeModel, score
from prefpipe.models.chat import load_chat
from prefpipe.models.policy import resolve
from prefpipe.stages import build_pairs
from prefpipe.stages.generate import stage as generate
from prefpipe.stages.train import stage
from tests.tiny import with_tokenizer

MAX_TOKENS = 24
PROMPTS = {name: list(map(ord, name)) for name in ("a bird", "an owl", "a song", "the sea at night", "x")}


@pytest.fixture(scope="module")
def settings(tiny_model: Path) -> EngineSettings:
    policy = resolve(str(tiny_model))
    return EngineSettings(policy, load_chat(tiny_model), "float32", 1.0, MAX_TOKENS, 64, 8, 64)


@pytest.fixture(scope="module")
def engine(settings: EngineSettings) -> Iterator[Engine]:
    with engines.load("transformers", settings) as running:
        yield running


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter that changes the model: B is not zero."""
    return write_adapter(tiny_model, tmp_path_factory.mktemp("adapter"), r=4)


def write_adapter(base: Path, directory: Path, **changes: Any) -> Path:
    options: dict[str, Any] = {"alpha": 8, "target_modules": "all-linear", "seed": 0, **changes}
    model = add_lora(load_model(base, "float32"), **options)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    save_adapter(model, adapter_tensors(model), directory, "tiny")
    return directory


def requests(*draws: Draw, prompts: dict[str, list[int]] = PROMPTS) -> list[Request]:
    return [Request(name, ids, draws) for name, ids in prompts.items()]


def sampled(engine: Engine, given_: list[Request]) -> dict[str, list[Sample]]:
    return {request.prompt_id: samples for request, samples in engine.generate(given_)}


def sequences(samples: dict[str, list[Sample]]) -> list[ScoreRequest]:
    return [
        ScoreRequest(f"{name}/{s.sample_index}", PROMPTS[name], s.token_ids)
        for name, own in samples.items()
        for s in own
    ]


DRAWS = tuple(Draw(k, 100 + k, 1.0) for k in range(6))


def test_a_query_is_answered_by_what_sampling_gives_and_nothing_is_scored(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {name: own[0] for name, own in sampled(engine, requests(Draw(0, 5, 1.0))).items()}
    monkeypatch.setattr(engine, "_score", lambda _trees: pytest.fail("an answer needs no log-probs"))
    found = list(engine.respond(Query(name, ids, 5, 1.0, None) for name, ids in PROMPTS.items()))
    assert {q.query_id: r.token_ids for q, r in found} == {n: s.token_ids for n, s in expected.items()}
    assert {q.query_id: r.finish_reason for q, r in found} == {n: s.finish_reason for n, s in expected.items()}
    with pytest.raises(UsageError, match="no structured output") as caught:
        list(engine.respond([Query("a", [1], 0, 0.0, {"type": "object"})]))
    assert "vllm" in caught.value.hint


def test_greedy_equals_generate_of_transformers(engine: Engine, tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config = GenerationConfig(do_sample=False, max_new_tokens=MAX_TOKENS, eos_token_id=2, pad_token_id=0)
    found = sampled(engine, requests(Draw(0, 0, 0.0)))
    assert set(found) == set(PROMPTS)
    for name, ids in PROMPTS.items():
        expected = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), generation_config=config)
        assert found[name][0].token_ids == expected[0, len(ids) :].tolist()


def test_log_probs_are_those_of_the_plain_model(engine: Engine, tiny_model: Path) -> None:
    """Captured while sampling and scored by the forward pass: within 2e-5 of full logits, before temperature."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    found = sampled(engine, requests(*(replace(d, temperature=0.7) for d in DRAWS)))
    scored = dict(engine.score(sequences(found), adapter=True))
    for sequence in sequences(found):
        name, _, index = sequence.completion_id.partition("/")
        ids = torch.tensor([[*sequence.prompt_token_ids, *sequence.token_ids]])
        with torch.no_grad():
            logps = model(ids).logits[0].log_softmax(-1)
        length = len(sequence.token_ids)
        plain = logps[-length - 1 : -1].gather(1, ids[0, -length:, None])[:, 0].tolist()
        assert scored[sequence.completion_id] == pytest.approx(plain, abs=2e-5)
        assert found[name][int(index)].token_logps == pytest.approx(plain, abs=2e-5)


def test_log_probs_captured_and_scored_are_the_same_numbers(engine: Engine) -> None:
    """One forward pass serves both: the same tree gives the same bits; in another row of trees, within rounding."""
    for name, ids in PROMPTS.items():
        ((_, samples),) = engine.generate([Request(name, ids, DRAWS)])
        scored = dict(engine.score(sequences({name: samples}), adapter=True))
        assert [scored[f"{name}/{s.sample_index}"] for s in samples] == [s.token_logps for s in samples]
    found = sampled(engine, requests(*DRAWS))
    scored = dict(engine.score(sequences(found), adapter=True))
    for name, own in found.items():
        for sample in own:
            assert scored[f"{name}/{sample.sample_index}"] == pytest.approx(sample.token_logps, abs=2e-5)


def test_neighbours_with_one_prompt_are_scored_as_one_tree(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five prompts with six draws each: five trees of six completions in the order given; scattered they are 30."""
    seen: list[list[int]] = []

    def watched(model: TreeModel, trees: Iterable[Tree], budget: int) -> Iterator[list[list[float]]]:
        given_ = list(trees)
        seen.append([len(t.completions) for t in given_])
        return score(model, given_, budget)

    given_ = sequences(sampled(engine, requests(*DRAWS)))
    monkeypatch.setattr("prefpipe.engines.transformers.score", watched)
    together = dict(engine.score(given_, adapter=True))
    scattered = given_[::6] + [s for i, s in enumerate(given_) if i % 6]
    apart = dict(engine.score(scattered, adapter=True))
    assert seen[0] == [6] * 5
    assert seen[1] == [1] * 5 + [5] * 5
    assert list(together) == [s.completion_id for s in given_]
    for key, values in together.items():
        assert apart[key] == pytest.approx(values, abs=2e-5)


def test_a_model_that_cannot_share_rows_generates_with_a_notice(
    tmp_path: Path, tiny_model: Path, settings: EngineSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bloom: its log-probs are those of plain rows, and the notice comes once."""
    shutil.copytree(tiny_model, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    bloom = BloomConfig(vocab_size=264, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.3)
    AutoModelForCausalLM.from_config(bloom).save_pretrained(tmp_path / "m")
    policy = resolve(str(tmp_path / "m"))
    with engines.load("transformers", replace(settings, policy=policy, max_num_seqs=6)) as running:
        found = sampled(running, requests(*DRAWS))
    assert capsys.readouterr().err.count("in batches of similar lengths: its attention bias (ALiBi)") == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    for sequence in sequences(found):
        name, _, index = sequence.completion_id.partition("/")
        ids = torch.tensor([[*sequence.prompt_token_ids, *sequence.token_ids]])
        with torch.no_grad():
            logps = model(ids).logits[0].log_softmax(-1)
        length = len(sequence.token_ids)
        plain = logps[-length - 1 : -1].gather(1, ids[0, -length:, None])[:, 0].tolist()
        assert found[name][int(index)].token_logps == pytest.approx(plain, abs=2e-5)


def with_a_hidden_window(folder: Path) -> Path:
    """A random Qwen2-MoE, which keeps its window of 16 tokens to the mask."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, use_sliding_window=True, sliding_window=16, max_window_layers=2,
        initializer_range=0.3, eos_token_id=2,
    )  # fmt: skip
    return with_tokenizer(AutoModelForCausalLM.from_config(config), folder)


def test_a_window_that_attention_is_not_told_of_shows_in_the_first_longer_sequence(
    tmp_path: Path, settings: EngineSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    """Qwen2-MoE keeps its window of 16 tokens to the mask. Sequences up to 12 tokens share a row and are right; the
    first one of 30 comes in a later batch, and is computed in a row of its own."""
    directory = with_a_hidden_window(tmp_path / "m")
    short = [ScoreRequest(f"s{n}", [5] * 4, list(range(9, 9 + n))) for n in (3, 8)]
    long = [ScoreRequest(f"l{n}", list(range(20, 44)), list(range(9, 9 + n))) for n in (6, 2)]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with engines.load("transformers", replace(settings, policy=resolve(str(directory)))) as running:
        found = dict(running.score(short, adapter=True))
        assert "a row of its own" not in capsys.readouterr().err
        found |= dict(running.score(long, adapter=True))
        found |= {f"{key}/again": values for key, values in running.score(long, adapter=True)}
    assert capsys.readouterr().err.count("in batches of similar lengths: shared rows differ") == 1
    for sequence in (*short, *long):
        ids = torch.tensor([[*sequence.prompt_token_ids, *sequence.token_ids]])
        with torch.no_grad():
            logps = model(ids).logits[0].log_softmax(-1)
        length = len(sequence.token_ids)
        plain = logps[-length - 1 : -1].gather(1, ids[0, -length:, None])[:, 0].tolist()
        for key in (k for k in found if k.split("/")[0] == sequence.completion_id):
            assert found[key] == pytest.approx(plain, abs=2e-5)


@pytest.mark.parametrize("reference", ["policy", "base"])
def test_generated_pairs_audit_at_ln_2(tiny_model: Path, prompts_file: Path, tmp_path: Path, reference: str) -> None:
    """generate -> build-pairs -> train in one process, fp32: what was cached is what training computes, to 1e-6.

    The audit packs one pair, generation all draws of a prompt: other rows of trees, the same values.
    """
    reward = "tests.e2e.letters:most_letters"
    sampling = GenerateConfig(
        model=str(tiny_model), prompts=str(prompts_file), engine="transformers", dtype="float32", num_samples=4,
        max_tokens=12, rewards=(reward,), reference=reference,
    )  # fmt: skip
    generate.run(sampling, tmp_path / "g", force=False)
    pairing = BuildPairsConfig(
        completions=(str(tmp_path / "g"),), reward=reward, rule="best-worst", pairs_per_prompt=2,
        truncated_chosen="keep", gap_filter="none",
    )  # fmt: skip
    build_pairs.run(pairing, tmp_path / "p", force=False)
    training = TrainConfig(model=str(tiny_model), pairs=(str(tmp_path / "p"),), dtype="float32", train_batch_size=4)
    manifest = stage.run(training, tmp_path / "t", force=False)
    found = manifest["totals"]["audit"]
    assert found["rows"] == manifest["totals"]["pairs"] >= 8
    assert found["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found["absolute_mean"] < 1e-5
    first = json.loads((tmp_path / "t" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_every_draw_comes_back_once_and_ends_rightly(engine: Engine) -> None:
    """stop: the end is the last id and the only one; length: MAX_TOKENS ids without an end. Both happen here."""
    found = sampled(engine, requests(*DRAWS))
    assert {name: [s.sample_index for s in own] for name, own in found.items()} == {
        name: [d.sample_index for d in DRAWS] for name in PROMPTS
    }
    reasons = set()
    for sample in (s for own in found.values() for s in own):
        reasons.add(sample.finish_reason)
        assert len(sample.token_logps) == len(sample.token_ids)
        if sample.finish_reason == "stop":
            assert sample.token_ids.index(2) == len(sample.token_ids) - 1
        else:
            assert len(sample.token_ids) == MAX_TOKENS
            assert 2 not in sample.token_ids
    assert reasons == {"stop", "length"}


def test_an_end_at_the_last_token_is_a_stop(settings: EngineSettings, engine: Engine) -> None:
    """With max_tokens = the length of a stopped sample, the same sample comes back, still as stop."""
    found = sampled(engine, requests(*DRAWS))
    name, sample = next((n, s) for n, own in found.items() for s in own if s.finish_reason == "stop")
    draw = DRAWS[sample.sample_index]
    with engines.load("transformers", replace(settings, max_tokens=len(sample.token_ids))) as short:
        ((_, [again]),) = short.generate([Request(name, PROMPTS[name], (draw,))])
    assert (again.token_ids, again.finish_reason) == (sample.token_ids, "stop")


def test_a_seed_gives_the_same_sample_in_any_batch(engine: Engine) -> None:
    """Alone, together with others, and in another order: the ids are the same, the log-probs within rounding."""
    together = sampled(engine, requests(*DRAWS))
    backwards = sampled(engine, list(reversed(requests(*DRAWS))))
    assert sampled(engine, requests(*DRAWS)) == together
    for name, ids in PROMPTS.items():
        for draw in DRAWS:
            ((_, [alone]),) = engine.generate([Request(name, ids, (draw,))])
            for other in (together[name][draw.sample_index], backwards[name][draw.sample_index]):
                assert alone.token_ids == other.token_ids
                assert alone.token_logps == pytest.approx(other.token_logps, abs=2e-5)


def test_other_seeds_give_other_samples(engine: Engine) -> None:
    ((_, samples),) = engine.generate([Request("x", PROMPTS["x"], DRAWS)])
    assert len({tuple(s.token_ids) for s in samples}) == len(DRAWS)


def test_scoring_while_sampling_goes_on_disturbs_neither(engine: Engine) -> None:
    """A stage scores a committed shard (reference: base) while the next prompts are being sampled."""
    expected = sampled(engine, requests(*DRAWS))
    found: dict[str, list[Sample]] = {}
    for request, samples in engine.generate(requests(*DRAWS)):
        found[request.prompt_id] = samples
        scored = dict(engine.score(sequences({request.prompt_id: samples}), adapter=False))
        for sample in samples:
            values = scored[f"{request.prompt_id}/{sample.sample_index}"]
            assert values == pytest.approx(sample.token_logps, abs=2e-5)
    assert found == expected


def test_the_adapter_changes_samples_and_can_be_switched_off(
    settings: EngineSettings, engine: Engine, adapter: Path, tiny_model: Path
) -> None:
    policy = resolve(str(tiny_model), str(adapter))
    with engines.load("transformers", replace(settings, policy=policy)) as tuned:
        found = sampled(tuned, requests(*DRAWS))
        on = dict(tuned.score(sequences(found), adapter=True))
        off = dict(tuned.score(sequences(found), adapter=False))
        again = dict(tuned.score(sequences(found), adapter=True))
    base = dict(engine.score(sequences(found), adapter=False))
    assert off == base
    assert again == on
    assert max(abs(a - b) for key in on for a, b in zip(on[key], off[key], strict=True)) > 0.1
    for name, own in found.items():
        for sample in own:
            assert sample.token_logps == pytest.approx(on[f"{name}/{sample.sample_index}"], abs=2e-5)


def test_an_engine_that_takes_another_policy_gives_what_a_new_one_gives(
    settings: EngineSettings, adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """To an adapter, to one of another rank on other modules, to none, and back: bit by bit, with the adapter on and
    off."""
    other = write_adapter(tiny_model, tmp_path / "a", r=2, target_modules="q_proj,v_proj", seed=1)
    policies = [resolve(str(tiny_model), name) for name in ("none", str(adapter), str(other), "none", str(adapter))]

    def values(engine: Engine) -> tuple[dict[str, list[Sample]], list[dict[str, list[float]]]]:
        found = sampled(engine, requests(*DRAWS))
        return found, [dict(engine.score(sequences(found), adapter=on)) for on in (True, False)]

    with engines.load("transformers", replace(settings, policy=policies[0])) as warm:
        taken = [values(warm) for policy in policies if warm.take(policy)]
    fresh = []
    for policy in policies[:3]:
        with engines.load("transformers", replace(settings, policy=policy)) as engine:
            fresh.append(values(engine))
    assert taken == [*fresh, *fresh[:2]]
    assert fresh[0] != fresh[1] != fresh[2]


def test_the_scorer_names_forward_and_dtype(engine: Engine) -> None:
    """The numerics are the trainer's own forward, so that is what its values are signed with."""
    assert engine.scorer == scorer_name("float32")
    assert engine.scorer.startswith("forward-")
    assert engine.scorer.endswith("/float32")


def test_stop_token_ids_end_a_completion_and_stay_in_it(settings: EngineSettings, engine: Engine) -> None:
    """The third token of a long sample, made a stop token: the same sample, cut after it."""
    found = sampled(engine, requests(*DRAWS))
    name, whole = next((n, s) for n, own in found.items() for s in own if s.finish_reason == "length")
    stop = whole.token_ids[2]
    with engines.load("transformers", replace(settings, stop_token_ids=(stop,))) as stopping:
        ((_, [cut]),) = stopping.generate([Request(name, PROMPTS[name], (DRAWS[whole.sample_index],))])
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]
    assert cut.finish_reason == "stop"


def test_a_window_that_attention_is_not_told_of_ends_the_batch_of_all_lengths(
    tmp_path: Path, settings: EngineSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    """Qwen2-MoE keeps its window of 16 tokens to the mask. Completions of 20 tokens reach past it, so that prompts run
    by their lengths from the start, and greedy ones equal those of transformers."""
    directory = with_a_hidden_window(tmp_path / "m")
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    wanted = GenerationConfig(do_sample=False, max_new_tokens=20, eos_token_id=2, pad_token_id=0)
    with engines.load("transformers", replace(settings, policy=resolve(str(directory)), max_tokens=20)) as running:
        found = sampled(running, requests(Draw(0, 0, 0.0)))
    assert capsys.readouterr().err.count("shared rows differ") == 1
    for name, ids in PROMPTS.items():
        expected = plain.generate(torch.tensor([ids]), generation_config=wanted)
        assert found[name][0].token_ids == expected[0, len(ids) :].tolist()
