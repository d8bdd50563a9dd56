"""A shard of score belongs to the part of its number, and none may lack."""

from pathlib import Path
from typing import Any

import pytest

from prefpipe.config.score import ScoreConfig
from prefpipe.errors import DataError
from prefpipe.runs import store
from prefpipe.runs.resume import ROWS
from prefpipe.schemas import Dropped, to_table
from prefpipe.stages.gather import files
from prefpipe.stages.gather.parts import Part


def part(folder: Path, number: int, shards: list[int]) -> Part:
    """A run with empty ledgers of these shards."""
    config: Any = ScoreConfig(part=f"{number}/2")
    with store.open_run(folder / str(number), "score", config, {}, force=False) as run:
        for index in shards:
            run.write_part("dropped", Dropped, index, to_table(Dropped, []), {ROWS: f"rows {index}"})
        return Part(run.out, number, 2, run.finish({}, {}), {})


def place(folder: Path, *parts: Part) -> list[int]:
    with store.open_run(folder / "out", "score", ScoreConfig(), {}, force=False) as run:
        files.place(parts, run)
        files.place(parts, run)  # what is there stays
        assert run.has_shard(["dropped"], 0, {ROWS: "rows 0"})
        return run.parts("dropped")


def test_every_shard_is_placed_under_its_number(tmp_path: Path) -> None:
    assert place(tmp_path, part(tmp_path, 1, [0, 2]), part(tmp_path, 2, [1])) == [0, 1, 2]


@pytest.mark.parametrize(
    ("shards", "words"), [([0, 4], "no part has shard 2"), ([0, 1, 2], r"part-00001\.parquet is no shard of part 1/2")]
)
def test_a_shard_that_lacks_or_is_of_another_part_is_refused(tmp_path: Path, shards: list[int], words: str) -> None:
    with pytest.raises(DataError, match=words):
        place(tmp_path, part(tmp_path, 1, shards), part(tmp_path, 2, [1, 3]))
