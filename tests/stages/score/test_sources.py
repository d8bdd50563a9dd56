"""What score reads: inputs are identified by content, and shards are read only when asked for."""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefpipe.config.generate import GenerateConfig
from prefpipe.engines.base import ScoreRequest
from prefpipe.errors import DataError, MissingInputError, UsageError
from prefpipe.ids import IdSet
from prefpipe.inputs.kl_bank import kl_bank
from prefpipe.inputs.tokenised import Limits
from prefpipe.models.chat import load_chat
from prefpipe.rewards.base import Answer
from prefpipe.rows import key_of
from prefpipe.schemas import Dropped, Label, RankedGroup, Reward
from prefpipe.stages.generate import stage as generate
from prefpipe.stages.score import sources
from prefpipe.stages.score.sources import Reader, ShardRows
from tests.inputs.cases import read_labels
from tests.stages.train import data


def reader(model: Path, rows: int) -> Reader:
    return Reader(load_chat(model), Limits(), rows, {}, "answer", rated=False, known=defaultdict(IdSet))


def write(path: Path, count: int) -> Path:
    rows = ({"prompt": f"Q{i}", "chosen": "Yes.", "rejected": f"No {i}."} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_is_cut_into_shards_of_rows(tiny_model: Path, tmp_path: Path) -> None:
    found = list(sources.shards(str(write(tmp_path / "p.jsonl", 7)), reader(tiny_model, 3)))
    assert [shard.datasets for shard in found] == [("prompts", "completions", "pairs")] * 3
    batches = [shard.read() for shard in found]
    assert [len(b.rows["pairs"]) for b in batches] == [3, 3, 1]
    assert all(
        {s.completion_id for s in b.requests} == {c.completion_id for c in b.rows["completions"]} for b in batches
    )


def test_a_share_of_a_run_is_drawn_by_ids_and_seed_whatever_the_shards(tiny_model: Path, tmp_path: Path) -> None:
    run = data.write_pairs(tmp_path / "p", data.bare_pairs(120, num_prompts=60))

    def drawn(share: float, seed: int, rows: int = 50) -> set[str]:
        part = replace(reader(tiny_model, rows), share=share, seed=seed)
        return {pair.pair_id for shard in sources.shards(str(run), part) for pair in shard.read().rows["pairs"]}

    everything = drawn(1.0, 1)
    assert len(everything) == 120
    half = drawn(0.5, 1)
    assert 40 <= len(half) <= 80  # binomial: 60 +- 3.7 standard deviations of 5.5
    assert drawn(0.5, 1, rows=7) == half
    assert drawn(0.25, 1) < half
    assert drawn(0.5, 2) != half


@pytest.mark.parametrize("kind", ["file", "completions"])
def test_a_share_of_anything_else_is_refused(tmp_path: Path, tiny_model: Path, kind: str) -> None:
    source = write(tmp_path / "p.jsonl", 3)
    if kind == "completions":
        sampled = GenerateConfig(model=str(tiny_model), prompts=str(source), engine="fake", check=0)
        generate.run(sampled, tmp_path / "g", force=False)
        source = tmp_path / "g"
    sources.check_share([str(source)], 1.0)
    with pytest.raises(UsageError, match=r"share = 0\.5 is drawn from pairs, labels or groups of runs"):
        sources.check_share([str(source)], 0.5)


def test_nothing_is_tokenised_before_it_is_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    """The second row is faulty: the ledger of its shard says so when it is read."""
    path = write(tmp_path / "p.jsonl", 1)
    path.write_text(path.read_text() + '{"prompt": "Q", "chosen": null, "rejected": "No."}\n')
    good, bad = sources.shards(str(path), reader(tiny_model, 1))
    assert len(good.read().requests) == 2
    assert [row.reason for row in bad.read().dropped] == ["null"]


def test_an_empty_file_and_an_empty_run_are_errors(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(DataError, match="has no rows"):
        sources.check_format(str(tmp_path / "p.jsonl"), {})
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a",\n')
    with pytest.raises(DataError, match="line 2: not valid JSON"):
        sources.check_format(str(tmp_path / "p.jsonl"), {})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    with pytest.raises(MissingInputError, match="holds no complete run"):
        list(sources.shards(str(tmp_path / "run"), reader(tiny_model, 1)))


@pytest.fixture
def labels(tiny_model: Path, tmp_path: Path) -> list[Label]:
    path = tmp_path / "labels.jsonl"
    rows = ({"prompt": f"Q{i}", "completion": f"A {i}.", "label": True} for i in range(4))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_labels(path, load_chat(tiny_model))[0]


def group(prompt_id: str, *completion_ids: str) -> RankedGroup:
    n = len(completion_ids)
    return RankedGroup(
        prompt_id, [], [1], list(completion_ids), [[]] * n, [[2]] * n, ["d"] * n, [1.0] * n, ["stop"] * n, 1.0,
        None, None, None, None,
    )  # fmt: skip


def batch(rows: dict[str, list[Any]], *names: str) -> ShardRows:
    answers = [(name, Answer([], name, None)) for name in names]
    ratings = [Reward(name, "rating", 1.0, "ok", None) for name in names if not rows]
    return ShardRows(
        rows, [ScoreRequest(n, [1], [2]) for n in names], answers, ratings, [Dropped("line 1", "empty", "no text")]
    )


def names_of(found: ShardRows) -> list[list[str]]:
    return [
        [s.completion_id for s in found.requests],
        [n for n, _ in found.answers],
        [r.completion_id for r in found.ratings],
    ]


def test_completions_of_a_run_that_kill_are_not_scored_and_not_rated() -> None:
    found = sources.without(batch({}, "a", "b", "c"), {"b", "elsewhere"})
    assert names_of(found) == [["a", "c"]] * 3
    assert [(d.id, d.reason) for d in found.dropped] == [("line 1", "empty"), ("b", "engine_died")]


def test_a_group_goes_as_a_whole_and_what_only_it_needs_is_not_scored() -> None:
    groups = [group("p", "a", "b"), group("q", "c", "d")]
    found = sources.without(batch({"groups": groups}, "a", "b", "c", "d"), {"b"})
    assert found.rows == {"groups": groups[1:]}
    assert [s.completion_id for s in found.requests] == ["c", "d"]
    (_, lost) = found.dropped
    assert (lost.id, lost.reason, lost.detail) == ("p", "engine_died", "the engine died twice on completion b")


def test_labels_and_rows_of_the_bank_are_left_out_by_their_own_ids(labels: list[Label]) -> None:
    bank = kl_bank(labels, 4, 0)
    for dataset, rows in (("labels", labels), ("kl_bank", bank)):
        names = [key_of(row) for row in rows]
        found = sources.without(batch({dataset: rows}, *names), {names[1]})
        assert [key_of(row) for row in found.rows[dataset]] == [names[0], *names[2:]]
        assert [s.completion_id for s in found.requests] == [names[0], *names[2:]]
        assert [d.id for d in found.dropped] == ["line 1", names[1]]


def test_a_rating_of_a_completion_in_another_shard_goes_with_it() -> None:
    rated = ShardRows({"completions": []}, [], [], [Reward(n, "rating", 1.0, "ok", None) for n in ("a", "b")], [])
    found = sources.without(rated, {"b"})
    assert ([r.completion_id for r in found.ratings], [d.id for d in found.dropped]) == (["a"], ["b"])


def test_a_batch_without_killers_is_as_it_was(labels: list[Label]) -> None:
    whole = batch({"labels": labels}, *(row.completion_id for row in labels))
    assert sources.without(whole, frozenset()) == whole == sources.without(whole, {"somebody else"})
