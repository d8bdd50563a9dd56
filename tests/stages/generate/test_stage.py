"""The generate stage in process: what it writes, and that a rerun samples nothing twice."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefpipe import engines, machine
from prefpipe.config.generate import GenerateConfig
from prefpipe.engines import fake
from prefpipe.engines.base import EngineSettings, Request, Sample, ScoreRequest
from prefpipe.errors import DataError, MissingInputError, PrefpipeError, UsageError
from prefpipe.forward.load import adapter_tensors, add_lora, load_model, save_adapter
from prefpipe.ids import content_id, ids_digest, numbered_id, sample_seed
from prefpipe.models.chat import load_chat
from prefpipe.models.policy import adapter_base_record, resolve
from prefpipe.runs import store, tables
from prefpipe.runs.store import Manifest
from prefpipe.schemas import Completion, Dropped, Prompt, RefLogps, Reward, from_table
from prefpipe.stages.generate import stage as generate
from tests.engines.cases import ScriptedEngine, over_fake

LETTERS = "tests.e2e.letters:most_letters"
sampled: list[str] = []  # what the counting engine was asked for
stop_after: list[int] = []  # after how many prompts it fails


def counting(settings: EngineSettings) -> ScriptedEngine:
    """The fake engine with a record of what it samples; it can fail in the middle, as a real one does."""
    engine = over_fake(settings)

    def admit(_: Request | ScoreRequest) -> bool:
        if stop_after and len(sampled) == stop_after[0]:
            raise OSError("the engine is gone")
        return True

    def sample(request: Request) -> list[Sample]:
        sampled.append(request.prompt_id)
        return engine.sample(request)

    return replace(engine, admit=admit, sample=sample)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompt ids that the engine called fake samples from here on."""
    monkeypatch.setitem(engines.ENGINES, "fake", f"{__name__}:counting")
    sampled.clear()
    stop_after.clear()
    return sampled


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    model = add_lora(load_model(tiny_model, "float32"), r=2, alpha=2, target_modules="q_proj", seed=0)
    save_adapter(model, adapter_tensors(model), directory, "tiny")
    weights = resolve(str(tiny_model)).weights
    (directory / "prefpipe.json").write_text(adapter_base_record(weights))
    return directory


def config(model: Path, prompts: Path, **changes: Any) -> GenerateConfig:
    base = {"model": str(model), "prompts": str(prompts), "engine": "fake", "num_samples": 3, "max_tokens": 60}
    return GenerateConfig(**{**base, "shard_rows": 2, "rewards": ("short_sentence", LETTERS), **changes})


def run(settings: GenerateConfig, out: Path) -> Manifest:
    return generate.run(settings, out, force=False)


def rows(out: Path, dataset: str, row_type: type) -> list[Any]:
    return from_table(row_type, store.read_dataset(out, dataset, row_type))


def contents(out: Path) -> dict[str, bytes]:
    """Every file whose bytes are promised: all but times, locks and quarantine."""
    skipped = ("timing.jsonl", ".lock", ".owner", "manifest.json")
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in sorted(out.rglob("*"))
        if p.is_file() and p.name not in skipped and "quarantine" not in p.parts
    }


def test_every_dataset_and_total(tiny_model: Path, prompts_file: Path, tmp_path: Path) -> None:
    """Six prompts for training, three completions each, two per shard: three shards of every dataset."""
    manifest = run(config(tiny_model, prompts_file), tmp_path / "g")
    completions = rows(tmp_path / "g", "completions", Completion)
    prompts = rows(tmp_path / "g", "prompts", Prompt)
    logps = rows(tmp_path / "g", "ref_logps", RefLogps)
    totals = manifest["totals"]
    assert (totals["prompts"], totals["completions"]) == (6, 18)
    assert totals["tokens"] == sum(len(c.token_ids) for c in completions) == sum(r.num_tokens for r in logps)
    assert [p.prompt_id for p in prompts] == list(dict.fromkeys(c.prompt_id for c in completions))
    for folder in ("completions", "prompts", "ref_logps", "rewards/short_sentence", f"rewards/{LETTERS}"):
        assert sum(n.startswith(f"{folder}/") for n in manifest["files"]) == 3
    for name in ("short_sentence", LETTERS):
        rewards = rows(tmp_path / "g", f"rewards/{name}", Reward)
        assert [r.completion_id for r in rewards] == [c.completion_id for c in completions]
        assert {r.name for r in rewards} == {name}
        assert totals["mean_reward"][name] == pytest.approx(sum(r.reward for r in rewards) / 18)
    assert rows_dropped(tmp_path / "g") == []
    assert "18 completions of 6 prompts" in generate.summary(manifest, tmp_path / "g")[0]


def test_a_completion_is_identified_by_content(tiny_model: Path, prompts_file: Path, tmp_path: Path) -> None:
    """The id is a hash of prompt, policy, sampling settings and sample_index; the digest covers the exact ids."""
    run(config(tiny_model, prompts_file), tmp_path / "g")
    policy = resolve(str(tiny_model)).id
    chat = load_chat(tiny_model)
    completions = rows(tmp_path / "g", "completions", Completion)
    assert len({c.completion_id for c in completions}) == len(completions)
    for c in completions:
        settings = ["fake", machine.number_type()[0], 0, 1.0, 1.0, 0, 0.0, 60, []]
        key = content_id(c.prompt_id, ids_digest(c.prompt_token_ids, []), policy, settings)
        assert c.completion_id == numbered_id(key, c.sample_index)
        assert c.ids_digest == ids_digest(c.prompt_token_ids, c.token_ids)
        assert c.text == chat.decode(c.token_ids)
        assert c.policy == policy
    logps = {r.completion_id: r for r in rows(tmp_path / "g", "ref_logps", RefLogps)}
    for c in completions:
        row = logps[c.completion_id]
        assert (row.reference, row.scorer, row.ids_digest) == (policy, "fake-1", c.ids_digest)
        assert row.num_tokens == len(row.token_logps) == len(c.token_ids)
        assert row.ref_logps == pytest.approx(sum(row.token_logps), rel=1e-6)


def test_more_samples_of_a_prompt_contain_the_fewer(tiny_model: Path, prompts_file: Path, tmp_path: Path) -> None:
    """num_samples is no part of the id or the seed: a run with more starts with the same completions."""
    run(config(tiny_model, prompts_file, num_samples=2), tmp_path / "few")
    run(config(tiny_model, prompts_file, num_samples=4, shard_rows=5), tmp_path / "more")
    more = {c.completion_id: c for c in rows(tmp_path / "more", "completions", Completion)}
    few = rows(tmp_path / "few", "completions", Completion)
    assert len(more) == 2 * len(few)
    assert all(more[c.completion_id] == c for c in few)


def test_the_seed_of_a_draw_names_seed_prompt_and_index(tiny_model: Path, prompts_file: Path, tmp_path: Path) -> None:
    run(config(tiny_model, prompts_file, seed=5), tmp_path / "g")
    completion = rows(tmp_path / "g", "completions", Completion)[4]
    settings = EngineSettings(resolve(str(tiny_model)), load_chat(tiny_model), "bfloat16", 1.0, 60, 1024, 4, 64)
    draw = fake.Draw(1, sample_seed(5, completion.prompt_id, 1), 1.0)
    ((_, [again]),) = fake.FakeEngine(settings).generate([Request("x", [1], (draw,))])
    assert completion.sample_index == 1
    assert completion.token_ids == again.token_ids


def test_the_reference_is_policy_base_or_none(
    tiny_model: Path, prompts_file: Path, tmp_path: Path, adapter: Path
) -> None:
    """The fake engine gives 1/8 nat less per token with the adapter off: base = policy - num_tokens / 8."""
    common = {"adapter": str(adapter), "rewards": ()}
    manifests = {
        reference: run(config(tiny_model, prompts_file, reference=reference, **common), tmp_path / reference)
        for reference in ("policy", "base", "none")
    }
    policy = resolve(str(tiny_model), str(adapter))
    identities = {k: m["identity"] for k, m in manifests.items()}
    assert {i["policy"] for i in identities.values()} == {policy.id}
    assert [identities[k]["reference"] for k in ("policy", "base", "none")] == [policy.id, policy.base_id, None]
    own = rows(tmp_path / "policy", "ref_logps", RefLogps)
    base = rows(tmp_path / "base", "ref_logps", RefLogps)
    assert {r.reference for r in own} == {policy.id}
    assert {r.reference for r in base} == {policy.base_id}
    for a, b in zip(own, base, strict=True):
        assert (a.completion_id, a.ids_digest) == (b.completion_id, b.ids_digest)
        assert b.token_logps == pytest.approx([v - 0.125 for v in a.token_logps], abs=1e-6)
        assert b.ref_logps == pytest.approx(a.ref_logps - a.num_tokens / 8, abs=1e-4)
    with pytest.raises(MissingInputError, match="no dataset 'ref_logps'"):
        store.read_dataset(tmp_path / "none", "ref_logps", RefLogps)


def test_without_an_adapter_base_and_policy_are_the_same(tiny_model: Path, prompts_file: Path, tmp_path: Path) -> None:
    for reference in ("policy", "base"):
        run(config(tiny_model, prompts_file, reference=reference, rewards=()), tmp_path / reference)
    assert rows(tmp_path / "policy", "ref_logps", RefLogps) == rows(tmp_path / "base", "ref_logps", RefLogps)


def test_the_base_is_scored_while_the_next_shards_are_sampled(
    tiny_model: Path, prompts_file: Path, tmp_path: Path, adapter: Path
) -> None:
    """The real engine, several batches and shards: one pass with the adapter off per shard. B = 0, so base = policy."""
    changes = {"engine": "transformers", "dtype": "float32", "max_tokens": 8, "max_num_seqs": 3, "rewards": ()}
    changes |= {"check": 0}
    for reference in ("policy", "base"):
        settings = config(tiny_model, prompts_file, adapter=str(adapter), reference=reference, **changes)
        run(settings, tmp_path / reference)
    own = {r.completion_id: r for r in rows(tmp_path / "policy", "ref_logps", RefLogps)}
    base = rows(tmp_path / "base", "ref_logps", RefLogps)
    assert len(base) == len(own) == 18
    for row in base:
        assert row.token_logps == pytest.approx(own[row.completion_id].token_logps, abs=2e-4)


def test_a_complete_run_is_left_alone(
    tiny_model: Path, prompts_file: Path, tmp_path: Path, counted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(config(tiny_model, prompts_file), tmp_path / "g")
    before = contents(tmp_path / "g")
    assert len(counted) == 6
    assert run(config(tiny_model, prompts_file), tmp_path / "g") == first
    assert len(counted) == 6
    assert contents(tmp_path / "g") == before
    assert "is complete already" in capsys.readouterr().err


@pytest.mark.parametrize("failing_at", [0, 1, 2, 3, 5])
def test_a_rerun_samples_what_is_missing_and_gives_the_same_bytes(
    tiny_model: Path, prompts_file: Path, tmp_path: Path, counted: list[str], failing_at: int
) -> None:
    """Two prompts per shard: after n prompts n // 2 shards are committed and 6 - 2 * (n // 2) prompts are left."""
    expected = run(config(tiny_model, prompts_file), tmp_path / "whole")
    counted.clear()
    stop_after.append(failing_at)
    with pytest.raises(PrefpipeError, match="the engine is gone"):
        run(config(tiny_model, prompts_file), tmp_path / "g")
    assert not (tmp_path / "g" / "manifest.json").exists()
    stop_after.clear()
    counted.clear()
    found = run(config(tiny_model, prompts_file), tmp_path / "g")
    assert len(counted) == len(set(counted)) == 6 - 2 * (failing_at // 2)
    assert found == expected
    assert contents(tmp_path / "g") == contents(tmp_path / "whole")


def test_the_first_shard_size_counts_on_a_rerun(
    tiny_model: Path, prompts_file: Path, tmp_path: Path, counted: list[str]
) -> None:
    """Started with two prompts per shard, resumed with 5: the two committed prompts are not sampled again."""
    expected = run(config(tiny_model, prompts_file), tmp_path / "whole")
    counted.clear()
    stop_after.append(3)
    with pytest.raises(PrefpipeError, match="gone"):
        run(config(tiny_model, prompts_file), tmp_path / "g")
    stop_after.clear()
    counted.clear()
    found = run(config(tiny_model, prompts_file, shard_rows=5), tmp_path / "g")
    assert len(counted) == 4
    assert found["files"] == expected["files"]


def test_a_lost_or_damaged_shard_is_made_again_alone(
    tiny_model: Path, prompts_file: Path, tmp_path: Path, counted: list[str]
) -> None:
    """A shard is whole when all its datasets are: a damaged reward file costs its own two prompts."""
    out = tmp_path / "g"
    expected = run(config(tiny_model, prompts_file), out)
    before = contents(out)
    counted.clear()
    damaged = out / "rewards" / "short_sentence" / "part-00001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert run(config(tiny_model, prompts_file), out) == expected
    assert len(counted) == 2
    assert contents(out) == before
    assert list((out / "quarantine").iterdir())
    counted.clear()
    shutil.rmtree(out / "prompts")
    assert run(config(tiny_model, prompts_file), out) == expected
    assert len(counted) == 6
    assert contents(out) == before


def test_another_seed_in_the_same_directory_is_refused(tiny_model: Path, prompts_file: Path, tmp_path: Path) -> None:
    run(config(tiny_model, prompts_file), tmp_path / "g")
    with pytest.raises(UsageError, match="seed: 0 there, 1 now"):
        run(config(tiny_model, prompts_file, seed=1), tmp_path / "g")


def test_dropped_prompts_are_in_the_ledger(tiny_model: Path, tmp_path: Path) -> None:
    """Seven rows: two good ones, and five with a reason."""
    texts = ["good", "good", "x" * 500, " ", "spells <|im_end|>", "also good"]
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": t} for t in texts]
    lines.append({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = run(config(tiny_model, path, max_prompt_tokens=100), tmp_path / "g")
    assert manifest["totals"]["prompts"] == 2
    assert sorted(d.reason for d in rows_dropped(tmp_path / "g")) == [
        "bad_roles",
        "control_tokens",
        "duplicate",
        "empty",
        "too_long",
    ]
    assert "dropped.parquet" in manifest["files"]


def test_limit_and_split_choose_prompts(tiny_model: Path, prompts_file: Path, tmp_path: Path) -> None:
    manifest = run(config(tiny_model, prompts_file, split="heldout", limit=2), tmp_path / "g")
    assert manifest["totals"]["prompts"] == 2
    answers = [p.answer for p in rows(tmp_path / "g", "prompts", Prompt)]
    assert answers == ["moss", "tram"]


def test_errors_come_before_the_directory_is_touched(tiny_model: Path, prompts_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no prompts given"):
        run(GenerateConfig(engine="fake"), tmp_path / "g")
    with pytest.raises(DataError, match="no prompt with split"):
        run(config(tiny_model, prompts_file, split="nowhere"), tmp_path / "g")
    with pytest.raises(MissingInputError, match="no module 'no_such_module'"):
        run(config(tiny_model, prompts_file, rewards=("no_such_module:f",)), tmp_path / "g")
    assert not (tmp_path / "g").exists()


def rows_dropped(out: Path) -> list[Dropped]:
    return from_table(Dropped, tables.read_parquet(out / "dropped.parquet"))
