"""The shards that score writes: numbers and datasets, what is missing, and sums that do not depend on a restart."""

from collections import defaultdict
from pathlib import Path

import pytest

from prefpipe.config.score import ScoreConfig
from prefpipe.errors import DataError
from prefpipe.ids import IdSet, content_id
from prefpipe.inference.works import Finished, write
from prefpipe.rewards.base import Answer, Scored
from prefpipe.rows import ref_logps
from prefpipe.runs import store
from prefpipe.runs.store import Run
from prefpipe.schemas import Completion, Dropped, RefLogps, Reward, from_table, to_table
from prefpipe.stages.score import output
from prefpipe.stages.score.output import OutputShard
from prefpipe.stages.score.sources import ENGINE_DIED, InputShard, ShardRows

ROWS = {"input_rows": "digest"}
A, B, LOST = (content_id(name) for name in ("a", "b", "lost"))


def completion(completion_id: str) -> Completion:
    return Completion(completion_id, "p", 0, "text", [1], [2, 3], "imported", "m", "digest")


def shard_rows(*completion_ids: str, written_before: frozenset[str] = frozenset()) -> ShardRows:
    answers = [(name, Answer([], name, None)) for name in completion_ids]
    new = [completion(name) for name in completion_ids if name not in written_before]
    dropped = [Dropped(LOST, ENGINE_DIED, "twice"), Dropped("line 3", "empty", "no text")]
    return ShardRows({"completions": new}, [], answers, [], dropped, written_before)


def logps(*completion_ids: str) -> dict[str, RefLogps]:
    return {i: ref_logps(i, "digest", [-1.0, -0.5], reference="model", scorer="s") for i in completion_ids}


def test_shards_of_all_inputs_are_numbered_and_get_the_datasets_of_their_scores() -> None:
    inputs = [InputShard(names, shard_rows, "digest") for names in (("completions",), (), ("pairs",))]
    found = [(shard.index, shard.datasets) for shard in output.numbered(inputs, ["mine"], scored=True)]
    scores = ("ref_logps", "rewards/mine", "dropped")
    assert found == [(0, ("completions", *scores)), (1, scores), (2, ("pairs", *scores))]
    (first, *_) = output.numbered(inputs, [], scored=False)
    assert first.datasets == ("completions", "dropped")


def written(run: Run) -> list[OutputShard]:
    """Two shards on disk; completion A of the first is needed by the second as well."""
    shards = [OutputShard(i, ("completions", "ref_logps", "rewards/r", "dropped"), shard_rows, ROWS) for i in range(2)]
    rewards = {"r": lambda answers: [Scored(float(answer.text == A)) for answer in answers]}
    second = shard_rows(A, B, written_before=frozenset([A]))
    write(run, [Finished(0, output.parts(rewards, shards[0], shard_rows(A), logps(A)), 1)])
    write(run, [Finished(1, output.parts(rewards, shards[1], second, logps(A, B)), 2)])
    return shards


def test_what_an_earlier_shard_has_written_is_not_written_again(tmp_path: Path) -> None:
    with store.open_run(tmp_path / "s", "score", ScoreConfig(), {}, force=False) as run:
        written(run)
        ids = [
            [row.completion_id for row in from_table(RefLogps, run.read_part("ref_logps", RefLogps, i))] for i in (0, 1)
        ]
        assert ids == [[A], [B]]
        rewards = from_table(Reward, run.read_part("rewards/r", Reward, 1))
        assert [(r.completion_id, r.reward) for r in rewards] == [(A, 1.0), (B, 0.0)]
        totals = output.totals(run, ["r"], may_be_empty=False)
    assert (totals["rows"]["completions"], totals["rows"]["ref_logps"], totals["tokens"]) == (2, 2, 4)
    assert totals["mean_token_logp"] == -0.75
    assert totals["mean_reward"] == {"r": pytest.approx(2 / 3), "rating": None}
    assert totals["dropped"] == {"empty": 2, ENGINE_DIED: 2}


def test_a_missing_shard_comes_back_when_the_keys_of_those_before_it_are_known(tmp_path: Path) -> None:
    """A completion that the engine died on counts as known: it does not come up again."""
    known = defaultdict[str, IdSet](IdSet)
    with store.open_run(tmp_path / "s", "score", ScoreConfig(), {}, force=False) as run:
        shards = [*written(run), OutputShard(2, ("completions", "dropped"), shard_rows, ROWS)]
        assert [shard.index for shard in output.missing(shards, run, known)] == [2]
    assert [known["completions"].add(key) for key in (A, B, LOST, content_id("new"))] == [False, False, False, True]


def test_no_row_at_all_is_an_error(tmp_path: Path) -> None:
    with store.open_run(tmp_path / "s", "score", ScoreConfig(), {}, force=False) as run:
        run.write_part("dropped", Dropped, 0, to_table(Dropped, [Dropped("line 1", "empty", "no text")]))
        with pytest.raises(DataError, match="no row is left"):
            output.totals(run, [], may_be_empty=False)
