"""Which runs are parts of one command, by their config.json and manifests."""

from pathlib import Path

import pytest

from prefpipe.config.score import ScoreConfig
from prefpipe.errors import UsageError
from prefpipe.runs import store
from prefpipe.runs.resume import RowInputs
from prefpipe.stages.gather import parts


def part(folder: Path, name: str, shard_rows: int = 256) -> Path:
    """A complete run of score without a row."""
    config = ScoreConfig(part=name, shard_rows=shard_rows)
    out = folder / name.replace("/", "-")
    with store.open_run(out, "score", config, {}, force=False, by_row=RowInputs([], lambda _: ())) as run:
        run.finish({}, {})
    return out


def test_parts_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    runs = [part(tmp_path, f"{number}/11") for number in (10, 2, 11, 1, 3, 4, 5, 6, 7, 8, 9)]
    assert [found.number for found in parts.read(runs, tmp_path / "out")] == [*range(1, 12)]


def test_shards_of_another_size_have_other_numbers(tmp_path: Path) -> None:
    runs = [part(tmp_path, "1/2"), part(tmp_path, "2/2", shard_rows=8)]
    with pytest.raises(UsageError, match="shard_rows: 256 and 8"):
        parts.read(runs, tmp_path / "out")


def test_every_missing_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run of part 1/4, 3/4"):
        parts.read([part(tmp_path, "2/4"), part(tmp_path, "4/4")], tmp_path / "out")
