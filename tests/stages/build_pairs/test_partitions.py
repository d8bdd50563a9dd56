"""Partitions hold whole prompts and lose no row; batches of files stay below their size."""

from pathlib import Path

import polars as pl
import pytest

from prefpipe.stages.build_pairs import partitions
from prefpipe.stages.build_pairs.partitions import partition_of, split


def test_partitions_hold_whole_prompts_and_lose_nothing(tmp_path: Path) -> None:
    frame = pl.DataFrame({"prompt_id": [f"p{n % 20}" for n in range(100)], "n": range(100)})
    halves = (frame[::2], frame[1::2])
    parts = [
        p.collect()
        for p in split([f.lazy().with_columns(partition=partition_of(4)) for f in halves], 4, tmp_path / "parts")
    ]
    assert sorted(n for p in parts for n in p["n"]) == list(range(100))
    owners = [set(p["prompt_id"]) for p in parts]
    assert sum(len(o) for o in owners) == len(set[str]().union(*owners)) == 20
    assert len([o for o in owners if o]) > 1


def test_an_empty_partition_has_its_columns(tmp_path: Path) -> None:
    frame = pl.LazyFrame({"prompt_id": ["a"], "n": [1], "partition": pl.Series([2], dtype=pl.UInt16)})
    parts = [p.collect() for p in split([frame], 4, tmp_path / "parts")]
    assert [p.height for p in parts] == [0, 0, 1, 0]
    assert all(p.schema == parts[2].schema for p in parts)


def test_batches_hold_every_file_once_up_to_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes 4 4 4 9 1 with 8 at once: (4 4), (4), (9) alone although it is too large, (1)."""
    files = [tmp_path / str(n) for n in range(5)]
    for path, size in zip(files, (4, 4, 4, 9, 1), strict=True):
        path.write_bytes(b"x" * size)
    monkeypatch.setattr(partitions, "_BYTES_AT_ONCE", 8)
    found = partitions.batches([files[:1], files[1:]])
    assert found == [
        [files[:1], files[1:2]],
        [[], files[2:3]],
        [[], files[3:4]],
        [[], files[4:]],
    ]


def test_cut_loses_nothing() -> None:
    rows = pl.DataFrame({"prompt_id": [f"p{n}" for n in range(30)]})
    parts = partitions.cut(rows, 4)
    assert len(parts) == 4
    assert sorted(p for part in parts for p in part["prompt_id"]) == sorted(rows["prompt_id"])
