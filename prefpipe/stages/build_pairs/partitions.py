"""Rows of several runs, cut into partitions of whole prompts, each small enough for the memory."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from prefpipe.runs import fsio

_BYTES_AT_ONCE = 512 << 20
Files = Sequence[Sequence[Path]]  # of a dataset, by run


def scan(files: Files) -> pl.LazyFrame:
    """A dataset of several runs, with the number of its run in the column `run`."""
    return pl.concat(
        pl.scan_parquet(list(paths), glob=False).with_columns(run=pl.lit(number, pl.UInt16))
        for number, paths in enumerate(files)
    )


def partition_of(count: int) -> pl.Expr:
    """The partition of a row, by its prompt: 0 to count - 1."""
    return (pl.col("prompt_id").hash(0) % count).cast(pl.UInt16)


def split(frames: Sequence[pl.LazyFrame], count: int, folder: Path) -> list[pl.LazyFrame]:
    """Cut frames of the same columns by their column `partition` (0 to count - 1).

    One partition is held in memory, several are files in `folder`. The frames are written one after the other, since
    the partitioned sink of polars holds most of a frame in memory.
    """
    if count == 1:
        return [pl.concat(f.drop("partition").collect(engine="streaming") for f in frames).lazy()]
    fsio.make_dirs(folder)
    schema = frames[0].drop("partition").collect_schema()
    with fsio.storage_errors(folder):
        for number, frame in enumerate(frames):
            by = pl.PartitionBy(folder / str(number), key="partition", include_key=False)
            frame.sink_ipc(by, compression="lz4", mkdir=True)
    parts = [sorted(folder.glob(f"*/partition={number}/*")) for number in range(count)]
    return [pl.scan_ipc(files, glob=False) if files else pl.LazyFrame(schema=schema) for files in parts]


def cut(frame: pl.DataFrame, count: int) -> list[pl.DataFrame]:
    """The rows of each partition, of a frame in memory."""
    partition = frame.select(partition_of(count)).to_series()
    return [frame.filter(partition == number) for number in range(count)]


def batches(files: Files) -> list[Files]:
    """The files in batches of up to 512 MiB: what one pass may hold in memory."""
    filled: list[list[Path]] = [[]]
    size = 0
    for path in itertools.chain(*files):
        if filled[-1] and size + path.stat().st_size > _BYTES_AT_ONCE:
            filled.append([])
            size = 0
        filled[-1].append(path)
        size += path.stat().st_size
    return [[batch] for batch in filled]
