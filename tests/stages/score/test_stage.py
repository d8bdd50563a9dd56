"""The score stage: whatever it reads, every row gets its values once, in the same ids, or a reason."""

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.config.generate import GenerateConfig
from prefpipe.config.score import ScoreConfig
from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError, IdentityError, MissingInputError, UsageError
from prefpipe.ids import ids_digest
from prefpipe.inputs import files
from prefpipe.inputs.kl_bank import kl_bank
from prefpipe.models.chat import load_chat
from prefpipe.models.policy import resolve
from prefpipe.runs import store, tables
from prefpipe.runs.store import Manifest
from prefpipe.schemas import (
    Completion,
    Dropped,
    KlBank,
    Label,
    Pair,
    Prompt,
    RankedGroup,
    RefLogps,
    Reward,
    from_table,
    to_table,
)
from prefpipe.stages import build_pairs
from prefpipe.stages.generate import stage as generate
from prefpipe.stages.score import imports
from prefpipe.stages.score import stage as score
from prefpipe.stages.train import stage
from prefpipe.stages.train.reference.values import read_ref_logps
from tests.cases import assert_refused
from tests.conftest import Cli
from tests.inputs.cases import read_labels, read_pairs

Write = Callable[..., Path]
SHARDS = ("prompts/", "completions/", "pairs/", "ref_logps/", "dropped/")
PAIRS = [{"prompt": f"Name bird {i}.", "chosen": f"An owl {i}.", "rejected": "No."} for i in range(7)]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def call(*rows: dict[str, Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(list(rows)), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return call


@pytest.fixture(scope="module")
def generated(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of generate without log-probs, and the pairs built from it."""
    folder = tmp_path_factory.mktemp("runs")
    prompts = folder / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Tell me {i}.", "answer": "tool"}) + "\n" for i in range(6)))
    config = GenerateConfig(
        model=str(tiny_model), prompts=str(prompts), engine="fake", num_samples=4, shard_rows=2,
        rewards=("short_sentence",), reference="none",
    )  # fmt: skip
    generate.run(config, folder / "g", force=False)
    build_pairs.run(
        BuildPairsConfig(completions=(str(folder / "g"),), reward="short_sentence"), folder / "p", force=False
    )
    return folder / "g", folder / "p"


def run(model: Path, inputs: Path | str | list[Path], out: Path, **changes: Any) -> Manifest:
    sources = inputs if isinstance(inputs, list) else [inputs]
    base: dict[str, Any] = {"engine": "fake", "check": 0, "shard_rows": 3, "inputs": tuple(map(str, sources))}
    return score.run(ScoreConfig(model=str(model), **{**base, **changes}), out, force=False)


def rows(out: Path, dataset: str, row_type: type) -> list[Any]:
    return from_table(row_type, store.read_dataset(out, dataset, row_type))


def dropped(out: Path) -> list[Dropped]:
    return from_table(Dropped, tables.read_parquet(out / "dropped.parquet"))


def test_a_preference_file_becomes_filled_pairs_and_completions(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    """7 pairs, "No." comes back with every prompt: 14 completions; every value belongs to its ids."""
    manifest = run(tiny_model, write(*PAIRS), tmp_path / "s")
    assert manifest["totals"]["rows"] == {
        "completions": 14, "pairs": 7, "labels": 0, "kl_bank": 0, "groups": 0, "ref_logps": 14
    }  # fmt: skip
    logps = {r.completion_id: r for r in rows(tmp_path / "s", "ref_logps", RefLogps)}
    policy = resolve(str(tiny_model)).id
    expected, _ = read_pairs(write(*PAIRS), load_chat(tiny_model))
    for pair, plain in zip(rows(tmp_path / "s", "pairs", Pair), expected, strict=True):
        assert (pair.pair_id, pair.chosen_token_ids) == (plain.pair_id, plain.chosen_token_ids)
        for side in ("chosen", "rejected"):
            values = logps[getattr(pair, f"{side}_completion_id")]
            assert getattr(pair, f"ref_{side}_token_logps") == values.token_logps
            assert getattr(pair, f"ref_{side}_logps") == values.ref_logps
            assert values.ids_digest == getattr(pair, f"{side}_ids_digest")
        assert (pair.reference, pair.scorer) == (policy, "fake-1")
    completions = rows(tmp_path / "s", "completions", Completion)
    assert {c.completion_id for c in completions} == set(logps)
    assert {c.finish_reason for c in completions} == {"imported"}
    assert {p.prompt_id for p in rows(tmp_path / "s", "prompts", Prompt)} == {c.prompt_id for c in completions}


def test_values_are_those_of_the_trainers_forward(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    """An independent oracle: one plain forward pass of transformers per completion, full logits."""
    run(tiny_model, write(*PAIRS), tmp_path / "s", engine="transformers", dtype="float32", max_tokens_per_batch=64)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    logps = {r.completion_id: r for r in rows(tmp_path / "s", "ref_logps", RefLogps)}
    for c in rows(tmp_path / "s", "completions", Completion)[:6]:
        with torch.no_grad():
            all_logps = model(torch.tensor([c.prompt_token_ids + c.token_ids])).logits[0].log_softmax(-1)
        start = len(c.prompt_token_ids) - 1
        plain = [float(all_logps[start + i, t]) for i, t in enumerate(c.token_ids)]
        assert logps[c.completion_id].token_logps == pytest.approx(plain, abs=2e-5)


def test_ratings_become_a_reward_that_build_pairs_takes(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    listed = [
        {"instruction": f"Say {i}.", "completions": [
            {"model": "m", "response": "Yes, of course.", "overall_score": 9.0},
            {"model": "n", "response": "No.", "overall_score": 2.0},
            {"model": "o", "response": "Perhaps.", "overall_score": None}]}
        for i in range(3)
    ]  # fmt: skip
    manifest = run(tiny_model, write(*listed, name="u.parquet"), tmp_path / "s")
    assert manifest["totals"]["mean_reward"] == {"rating": 5.5}
    rewards = rows(tmp_path / "s", "rewards/rating", Reward)
    assert [(r.reward, r.status) for r in rewards[:3]] == [(9.0, "ok"), (2.0, "ok"), (None, "unparsable")]
    assert [c.policy for c in rows(tmp_path / "s", "completions", Completion)[:3]] == ["m", "n", "o"]
    assert len(rows(tmp_path / "s", "ref_logps", RefLogps)) == 9
    pairing = BuildPairsConfig(completions=(str(tmp_path / "s"),), reward="rating")
    build_pairs.run(pairing, tmp_path / "p", force=False)
    pairs = rows(tmp_path / "p", "pairs", Pair)
    assert [(p.chosen[0]["content"], p.rejected[0]["content"]) for p in pairs] == [("Yes, of course.", "No.")] * 3
    assert all(p.ref_chosen_logps is not None and p.reward_gap == 7.0 for p in pairs)


def test_ratings_that_begin_below_the_first_row_are_never_lost(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    texts = [{"prompt": f"Q{i}", "completions": ["Yes.", "No."]} for i in range(2)]
    late = {"prompt": "Q9", "completions": ["Yes.", "No."], "ratings": [2, 1]}
    with pytest.raises(DataError, match="the first rows of the file have no such field"):
        run(tiny_model, write(*texts, late), tmp_path / "late", shard_rows=2)
    run(tiny_model, write({**texts[0], "ratings": None}, late, name="null.jsonl"), tmp_path / "null")
    assert [r.reward for r in rows(tmp_path / "null", "rewards/rating", Reward)] == [None, None, 2.0, 1.0]


def test_rewards_that_are_all_nought_are_rewards(
    tiny_model: Path, generated: tuple[Path, Path], tmp_path: Path
) -> None:
    manifest = run(tiny_model, generated[0], tmp_path / "s", reference="none", rewards=("tests.e2e.nought:nought",))
    assert manifest["totals"]["mean_reward"]["tests.e2e.nought:nought"] == 0.0
    assert len(rows(tmp_path / "s", "rewards/tests.e2e.nought:nought", Reward)) == 24


def test_columns_that_no_format_reads_stay_with_the_prompt(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    run(tiny_model, write({**PAIRS[0], "answer": "owl", "level": 3, "source_dataset": "birds"}), tmp_path / "s")
    (prompt,) = rows(tmp_path / "s", "prompts", Prompt)
    assert (prompt.answer, json.loads(prompt.meta)) == ("owl", {"level": 3, "source_dataset": "birds"})


def test_ratings_of_pairs_are_their_rewards(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    rated = [{**PAIRS[0], "score_chosen": 8.0, "score_rejected": 3.0}]
    run(tiny_model, write(*rated), tmp_path / "s", reference="none")
    (pair,) = rows(tmp_path / "s", "pairs", Pair)
    assert (pair.chosen_reward, pair.rejected_reward, pair.reward_gap, pair.reference) == (8.0, 3.0, 5.0, None)
    assert [r.reward for r in rows(tmp_path / "s", "rewards/rating", Reward)] == [8.0, 3.0]


def test_labels_are_filled_and_rewards_added(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    given = [{"prompt": f"Q{i}", "completion": f"A tool {i}.", "label": i % 2 == 0} for i in range(4)]
    run(tiny_model, write(*given), tmp_path / "s", rewards=("short_sentence",))
    labels = rows(tmp_path / "s", "labels", Label)
    assert [row.label for row in labels] == [True, False, True, False]
    assert all(len(row.ref_token_logps) == len(row.token_ids) for row in labels)
    assert len(rows(tmp_path / "s", "rewards/short_sentence", Reward)) == 4


def test_completions_of_a_run_get_values_and_rewards(
    tiny_model: Path, generated: tuple[Path, Path], tmp_path: Path
) -> None:
    """Rewards of a later score equal those that generate made: the same answers, prompts and expected answers."""
    source, _ = generated
    manifest = run(tiny_model, source, tmp_path / "s", rewards=("short_sentence",))
    completions = {c.completion_id: c for c in rows(source, "completions", Completion)}
    logps = rows(tmp_path / "s", "ref_logps", RefLogps)
    assert {r.completion_id for r in logps} == set(completions)
    assert all(r.ids_digest == completions[r.completion_id].ids_digest for r in logps)
    assert rows(tmp_path / "s", "rewards/short_sentence", Reward) == rows(source, "rewards/short_sentence", Reward)
    assert not (tmp_path / "s" / "completions").exists()
    assert manifest["totals"]["rows"]["ref_logps"] == 24
    assert "24 ref_logps" in score.summary(manifest, tmp_path / "s")[0]


def test_pairs_of_a_run_are_filled(tiny_model: Path, generated: tuple[Path, Path], tmp_path: Path) -> None:
    _, source = generated
    run(tiny_model, source, tmp_path / "s")
    for before, after in zip(rows(source, "pairs", Pair), rows(tmp_path / "s", "pairs", Pair), strict=True):
        assert before.ref_chosen_logps is None
        assert after.ref_chosen_logps == pytest.approx(sum(after.ref_chosen_token_logps), rel=1e-5)
        assert (before.pair_id, before.weight, before.chosen) == (after.pair_id, after.weight, after.chosen)


def test_labels_bank_and_groups_of_a_run_are_filled(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    """Written as build-pairs writes them; each kind has its own shape of the same columns."""
    given = [{"prompt": f"Q{i}", "completion": f"A {i}.", "label": True} for i in range(4)]
    labels, _ = read_labels(write(*given), load_chat(tiny_model))
    group = RankedGroup(
        "p", labels[0].prompt, labels[0].prompt_token_ids, ["a", "b"], [labels[0].completion] * 2, [[7, 2], [8, 9, 2]],
        [ids_digest(labels[0].prompt_token_ids, ids) for ids in ([7, 2], [8, 9, 2])], [1.0, 0.0], ["stop"] * 2, 1.0,
        None, None, None, None,
    )  # fmt: skip
    with store.open_run(tmp_path / "p", "build-pairs", BuildPairsConfig(), {}, force=False) as made:
        made.write_part("labels", Label, 0, to_table(Label, labels))
        made.write_part("kl_bank", KlBank, 0, to_table(KlBank, kl_bank(labels, 5, 0)))
        made.write_part("groups", RankedGroup, 0, to_table(RankedGroup, [group]))
        made.finish({}, {})
    run(tiny_model, tmp_path / "p", tmp_path / "s")
    for name, row_type in (("labels", Label), ("kl_bank", KlBank)):
        filled = rows(tmp_path / "s", name, row_type)
        assert len(filled) == len(rows(tmp_path / "p", name, row_type))
        assert all(len(r.ref_token_logps) == len(r.token_ids) and r.scorer == "fake-1" for r in filled)
    (filled,) = rows(tmp_path / "s", "groups", RankedGroup)
    assert [len(v) for v in filled.ref_token_logps] == [2, 3]
    assert filled.ref_logps == pytest.approx([sum(v) for v in filled.ref_token_logps], rel=1e-5)


def test_train_takes_the_output(tiny_model: Path, tmp_path: Path, write: Write) -> None:
    """From a foreign file to a trained adapter; the step-0 audit finds the values to be this model's own, exactly."""
    run(tiny_model, write(*PAIRS), tmp_path / "s", engine="transformers", dtype="float32")
    config = TrainConfig(model=str(tiny_model), pairs=(str(tmp_path / "s"),), dtype="float32", lora_r=2)
    manifest = stage.run(config, tmp_path / "t", force=False)
    assert not (tmp_path / "t" / "ref_logps").exists()  # nothing was missing
    assert manifest["totals"]["audit"]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_a_rerun_scores_what_is_missing_and_gives_the_same_bytes(
    tiny_model: Path, write: Write, tmp_path: Path
) -> None:
    path = write(*PAIRS)
    expected = run(tiny_model, path, tmp_path / "s")
    shutil.copytree(tmp_path / "s", tmp_path / "cut")
    (tmp_path / "cut" / "manifest.json").unlink()
    for name in ("pairs/part-00001.parquet", "ref_logps/part-00002.ok.json"):
        (tmp_path / "cut" / name).unlink()
    kept = tmp_path / "cut" / "completions" / "part-00000.parquet"
    written = kept.stat().st_mtime_ns
    assert run(tiny_model, path, tmp_path / "cut", shard_rows=5) == expected
    assert kept.stat().st_mtime_ns == written
    for name in expected["files"]:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "s" / name).read_bytes()
    assert run(tiny_model, path, tmp_path / "s") == expected


def test_shards_do_not_change_values(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    path = write(*PAIRS)
    for size in (1, 100):
        run(tiny_model, path, tmp_path / str(size), shard_rows=size)
    for name, row_type in (("pairs", Pair), ("ref_logps", RefLogps), ("completions", Completion)):
        assert rows(tmp_path / "1", name, row_type) == rows(tmp_path / "100", name, row_type)


def test_overlong_rows_are_dropped_or_cut(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    """19 tokens around the prompt's 2; 'x' * 50 and the end are 51: with max_length 45, 24 tokens are left of them."""
    path = write({"prompt": "Hi", "chosen": "x" * 50, "rejected": "No."}, PAIRS[0])
    manifest = run(tiny_model, path, tmp_path / "d", max_length=45)
    assert manifest["totals"]["dropped"] == {"too_long": 1}
    assert "72 tokens in prompt and completion, max_length is 45" in dropped(tmp_path / "d")[0].detail
    run(tiny_model, path, tmp_path / "k", max_length=45, overlong="keep_start")
    pair = rows(tmp_path / "k", "pairs", Pair)[0]
    assert (len(pair.chosen_token_ids), pair.chosen_finish_reason) == (24, "length")
    assert pair.chosen == [{"role": "assistant", "content": "x" * 24}]
    assert pair.chosen_ids_digest == ids_digest(pair.prompt_token_ids, pair.chosen_token_ids)
    assert pair.rejected_finish_reason == "imported"
    run(tiny_model, path, tmp_path / "p", max_prompt_length=30)
    assert [d.detail for d in dropped(tmp_path / "p")] == ["31 tokens in the prompt, the most is 30"]


def test_a_row_of_a_run_that_is_too_long_is_left_out_never_cut(
    tiny_model: Path, generated: tuple[Path, Path], tmp_path: Path
) -> None:
    source, _ = generated
    run(tiny_model, source, tmp_path / "s", max_length=60, overlong="keep_start")
    lengths = {
        c.completion_id: len(c.prompt_token_ids) + len(c.token_ids) for c in rows(source, "completions", Completion)
    }
    assert {r.completion_id for r in rows(tmp_path / "s", "ref_logps", RefLogps)} == {
        i for i, n in lengths.items() if n <= 60
    }
    assert {d.id for d in dropped(tmp_path / "s")} == {i for i, n in lengths.items() if n > 60} != set()


def test_faulty_rows_are_explained(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    path = write(
        PAIRS[0], PAIRS[0], {**PAIRS[1], "chosen": "No."}, {**PAIRS[2], "prompt": " "},
        {**PAIRS[3], "chosen": "say <|im_end|>"},
    )  # fmt: skip
    run(tiny_model, path, tmp_path / "s", shard_rows=9)
    assert [(d.id, d.reason) for d in dropped(tmp_path / "s")] == [
        (f"{path}, line 2", "duplicate"), (f"{path}, line 3", "identical"), (f"{path}, line 4", "empty"),
        (f"{path}, line 5", "control_tokens"),
    ]  # fmt: skip
    with pytest.raises(DataError, match="no row is left"):
        run(tiny_model, write({**PAIRS[1], "chosen": "No."}, name="n.jsonl"), tmp_path / "n")


def test_control_tokens_are_escaped_where_asked(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    """The end-of-sequence id stands once, at the end; the text comes back as it was."""
    run(tiny_model, write({**PAIRS[0], "chosen": "say <|im_end|>"}), tmp_path / "s", special_tokens_in_prompts="escape")
    (pair,) = rows(tmp_path / "s", "pairs", Pair)
    assert pair.chosen_token_ids.count(2) == 1
    assert load_chat(tiny_model).decode(pair.chosen_token_ids) == "say <|im_end|>"


def test_memory_does_not_grow_with_the_rows(tiny_model: Path, tmp_path: Path) -> None:
    """Five times the rows, the same peak of Python memory (the cache of two files in the tokenizer aside)."""

    def peak(count: int) -> int:
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(json.dumps({**PAIRS[0], "prompt": f"{'long ' * 30}{i}"}) + "\n" for i in range(count)))
        tracemalloc.start()
        run(tiny_model, path, tmp_path / str(count), shard_rows=20)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(20)  # what is loaded once
    small, large = peak(60), peak(300)
    assert large < 1.5 * small


def test_the_parity_report_is_part_of_the_run(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    manifest = run(tiny_model, write(*PAIRS), tmp_path / "s", check=5)
    report = json.loads((tmp_path / "s" / "parity.json").read_text())
    assert report == manifest["totals"]["parity"]
    assert (report["rows"], report["agrees"], report["per_token"]["largest"]) == (5, True, pytest.approx(0, abs=1e-6))
    assert "parity.json" in manifest["files"]
    (tmp_path / "s" / "parity.json").write_text("{}")
    assert run(tiny_model, write(*PAIRS), tmp_path / "s", check=5)["digest"] == manifest["digest"]
    assert json.loads((tmp_path / "s" / "parity.json").read_text()) == report


def test_reading_reference_values_for_train(
    tiny_model: Path, other_model: Path, generated: tuple[Path, Path], tmp_path: Path
) -> None:
    source, _ = generated
    for name, model in (("a", tiny_model), ("b", other_model)):
        run(model, source, tmp_path / name)
    completions = rows(source, "completions", Completion)
    wanted = {c.completion_id: c.ids_digest for c in completions[3:9]}
    found = read_ref_logps([tmp_path / "a"], {**wanted, "unknown": "x"})
    assert set(found) == set(wanted)
    by_id = {r.completion_id: r for r in rows(tmp_path / "a", "ref_logps", RefLogps)}
    assert all(found[i] == by_id[i] for i in wanted)
    first = next(iter(wanted))
    with pytest.raises(
        IdentityError, match=f"log-probs of 1 completions were made for other token ids .first: completion {first}"
    ):
        read_ref_logps([tmp_path / "a"], {**wanted, first: "another"})
    assert read_ref_logps([tmp_path / "a", tmp_path / "b"], wanted) == found  # the first run that has a row counts
    with pytest.raises(MissingInputError, match="no dataset 'ref_logps'"):
        read_ref_logps([source], wanted)


def test_two_references_never_mix(tiny_model: Path, other_model: Path, write: Write, tmp_path: Path) -> None:
    run(tiny_model, write(*PAIRS[:3]), tmp_path / "a")
    run(other_model, write(*PAIRS[3:], name="b.jsonl"), tmp_path / "b")
    both = [r for n in "ab" for r in rows(tmp_path / n, "ref_logps", RefLogps)]
    with pytest.raises(DataError, match="log-probs of 2 references"):
        read_ref_logps([tmp_path / "a", tmp_path / "b"], {r.completion_id: r.ids_digest for r in both})


def test_edited_ids_are_refused(tiny_model: Path, generated: tuple[Path, Path], tmp_path: Path) -> None:
    """The manifest is made to match, so that only the digest of the row can tell."""
    source, _ = generated
    one, *_ = rows(source, "completions", Completion)
    broken = Completion(**{**one.__dict__, "token_ids": [*one.token_ids[:-2], 9, 2]})
    with store.open_run(tmp_path / "g", "generate", GenerateConfig(), {}, force=False) as made:
        made.write_part("completions", Completion, 0, to_table(Completion, [broken]))
        made.finish({"completions": 1}, {})
    with pytest.raises(IdentityError, match=rf"{one.completion_id} do not match their digest \(ids_digest\)"):
        run(tiny_model, tmp_path / "g", tmp_path / "s")


def test_what_cannot_be_done_is_said_before_anything_is_written(
    cli: Cli, tiny_model: Path, generated: tuple[Path, Path], write: Write, tmp_path: Path
) -> None:
    completions, pairs = generated
    out = tmp_path / "o"
    with pytest.raises(UsageError, match="no inputs given"):
        score.run(ScoreConfig(model=str(tiny_model)), out, force=False)
    done = cli("score", "--inputs", completions, "--reference", "none", "--out", out)
    assert_refused(done, 2, "nothing to do: no reference and no rewards")
    with pytest.raises(MissingInputError, match=r"absent\.jsonl does not exist"):
        run(tiny_model, tmp_path / "absent.jsonl", out)
    assert not out.exists()
    with pytest.raises(MissingInputError, match="no completions to rate"):
        run(tiny_model, pairs, out, rewards=("short_sentence",))
    done = cli("score", "--model", tiny_model, "--inputs", write({"q": 1}), "--engine", "fake", "--out", tmp_path / "p")
    assert_refused(done, 65, "rows.jsonl, line 1", "no known format has the columns q")


def test_another_tokenizer_is_a_notice_for_ids_and_an_identity_for_text(
    cli: Cli, tiny_model: Path, generated: tuple[Path, Path], write: Write, tmp_path: Path
) -> None:
    """Cached ids are scored as they are: a changed template changes nothing but the text of new rows."""
    source, _ = generated
    template = tmp_path / "t.jinja"
    template.write_text((tiny_model / "chat_template.jinja").read_text() + " ")
    common = ("score", "--model", tiny_model, "--engine", "fake", "--check", 0)
    for flags in ((), ("--chat-template", template)):
        done = cli(*common, "--inputs", source, "--out", tmp_path / "ids", *flags)
        assert done.returncode == 0, done.stderr
        assert ("was made with another chat template" in done.stderr) is bool(flags)
    path = write(*PAIRS)
    assert cli(*common, "--inputs", path, "--out", tmp_path / "text").returncode == 0
    done = cli(*common, "--inputs", path, "--out", tmp_path / "text", "--chat-template", template)
    assert_refused(done, 2, "input:chat_template")


LOST: dict[str, tuple[list[dict[str, Any]], str, str]] = {
    # rows, a dataset that loses one of them, and what the balance says
    "pairs": (PAIRS, "pairs", "7 rows came in, but 6 are kept and 0 dropped"),
    "labels": ([{"prompt": p["prompt"], "completion": "Yes.", "label": True} for p in PAIRS], "labels",
               "7 rows came in, but 6 are kept and 0 dropped"),
    "answers": ([{"prompt": "Name birds.", "completions": ["An owl.", "A tit.", "An owl."]}, {"prompt": "Name one."}],
                "completions", "4 rows came in, but 1 are kept and 2 dropped"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOST)
def test_a_row_that_is_neither_kept_nor_in_the_ledger_is_no_run(
    tiny_model: Path, write: Write, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pair, answer and faulty row is accounted for; here reading loses one."""
    content, dataset, said = LOST[name]
    read = imports.import_rows
    lossy = [True]

    def losing(*given: Any, **named: Any) -> imports.Imported:
        imported = read(*given, **named)
        if lossy.pop() if lossy else False:
            getattr(imported, dataset).pop()
            if dataset == "labels":
                imported.completions.pop()
        return imported

    monkeypatch.setattr(imports, "import_rows", losing)
    with pytest.raises(DataError, match=said):
        run(tiny_model, write(*content), tmp_path / "s", reference="none")
    assert not (tmp_path / "s" / "manifest.json").exists()
    assert run(tiny_model, write(*content), tmp_path / "whole", reference="none")["files"]


def test_a_complete_run_reads_no_row(
    tiny_model: Path, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(*PAIRS)
    manifest = run(tiny_model, source, tmp_path / "s")

    def refused(*_: Any) -> Any:
        raise AssertionError("a row is read")

    monkeypatch.setattr(files, "rows", refused)
    assert run(tiny_model, source, tmp_path / "s") == manifest


@pytest.mark.parametrize("count", [2, 3])
def test_the_shards_of_all_parts_are_those_of_one_run(
    tiny_model: Path, write: Write, tmp_path: Path, count: int
) -> None:
    """Rows that repeat an earlier one, in whichever part, are left out as in one run."""
    rows = write(*PAIRS, *PAIRS[2:4], {"prompt": "Odd", "chosen": 1}, {**PAIRS[0], "rejected": "Never."}, *PAIRS[:1])
    config = ScoreConfig(model=str(tiny_model), inputs=(str(rows),), engine="fake", shard_rows=2)
    whole = score.run(config, tmp_path / "whole", force=False)["files"]
    parts = [config.model_copy(update={"part": f"{i}/{count}"}) for i in range(1, count + 1)]
    manifests = [score.run(part, tmp_path / part.part.replace("/", "-"), force=False) for part in parts]
    files = [{name: file for name, file in m["files"].items() if name.startswith(SHARDS)} for m in manifests]
    assert {name: file for found in files for name, file in found.items()} == {
        name: file for name, file in whole.items() if name.startswith(SHARDS)
    }
    assert sum(map(len, files)) == len({name for found in files for name in found})


def test_a_part_goes_on_where_it_was_killed_and_may_hold_nothing(
    generated: tuple[Path, Path], tiny_model: Path, tmp_path: Path
) -> None:
    run, _ = generated  # three shards
    config = ScoreConfig(model=str(tiny_model), inputs=(str(run),), engine="fake", part="1/2")
    whole = score.run(config, tmp_path / "a", force=False)
    assert {name for name in whole["files"] if name.startswith("ref_logps/")} == {
        "ref_logps/part-00000.parquet",
        "ref_logps/part-00002.parquet",
    }
    for name in ("manifest.json", "ref_logps/part-00002.ok.json"):
        (tmp_path / "a" / name).unlink()
    assert score.run(config, tmp_path / "a", force=False)["digest"] == whole["digest"]
    empty = score.run(config.model_copy(update={"part": "4/4"}), tmp_path / "b", force=False)
    assert empty["totals"]["rows"]["ref_logps"] == 0
    with pytest.raises(UsageError, match="part = '3/2': there are only 2 parts"):
        score.run(config.model_copy(update={"part": "3/2"}), tmp_path / "c", force=False)
