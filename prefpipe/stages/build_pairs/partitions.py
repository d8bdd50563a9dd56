"""Rows of several runs, cut into partitions of whole prompts that fit into memory one at a time."""

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from prefpipe.runs import fsio
from prefpipe.runs.storage import storage_errors
from prefpipe.schemas import arrow_schema
from prefpipe.stages.build_pairs.tasks import Map

_BYTES_AT_ONCE = 128 << 20
Files = Sequence[Sequence[Path]]  # of a dataset, by run


def scan(files: Files, row_type: type) -> pl.LazyFrame:
    """The rows of a dataset in several runs, with the number of the run as `run`. Columns that a file lacks are
    null."""
    schema = pl.DataFrame(arrow_schema(row_type).empty_table()).schema
    filled = [(number, paths) for number, paths in enumerate(files) if paths]
    return pl.concat(
        pl.scan_parquet(
            list(paths),
            schema=schema,
            missing_columns="insert",
            cast_options=pl.ScanCastOptions(missing_struct_fields="insert"),
            glob=False,
        ).with_columns(run=pl.lit(number, pl.UInt16))
        for number, paths in filled
    )


def partition_of(count: int, key: str = "prompt_id") -> pl.Expr:
    """The number of the partition that a row belongs to, by its prompt or another key: 0 to count - 1."""
    return (pl.col(key).hash(0) % count).cast(pl.UInt16)


def split(frames: Sequence[pl.LazyFrame], count: int, folder: Path, run: Map = map) -> list[pl.LazyFrame]:
    """The partitions of frames that have the same columns, by their column `partition` (0 to count - 1).

    One partition is held in memory; several are files in `folder`. Each frame is written by a task, since the
    partitioned sink of polars holds most of a frame in memory.
    """
    if count == 1:
        return [pl.concat(f.drop("partition").collect(engine="streaming") for f in frames).lazy()]
    deque(run(sink, frames, (folder / str(number) for number in range(len(frames)))), maxlen=0)
    return parts_of(frames[0].drop("partition").collect_schema(), count, folder)


def sink(frame: pl.LazyFrame, folder: Path) -> None:
    """Write a frame into files by its column `partition`."""
    fsio.make_dirs(folder)
    with storage_errors(folder):
        by = pl.PartitionBy(folder, key="partition", include_key=False)
        frame.sink_ipc(by, compression="lz4", mkdir=True)


def parts_of(schema: Mapping[str, pl.DataType], count: int, folder: Path) -> list[pl.LazyFrame]:
    """The partitions that `sink` wrote into folders inside `folder`."""
    parts = [sorted(folder.glob(f"*/partition={number}/*")) for number in range(count)]
    return [pl.scan_ipc(files, glob=False) if files else pl.LazyFrame(schema=schema) for files in parts]


def cut(frame: pl.DataFrame, count: int) -> list[pl.DataFrame]:
    """The rows of each partition, from a frame in memory."""
    partition = frame.select(partition_of(count)).to_series()
    return [frame.filter(partition == number) for number in range(count)]


def batches(files: Files) -> list[Files]:
    """The files in batches of up to 128 MiB, by run: as much as one pass may hold in memory."""
    filled: list[list[list[Path]]] = []
    size = 0
    for number, path in ((number, path) for number, paths in enumerate(files) for path in paths):
        if not filled or size + path.stat().st_size > _BYTES_AT_ONCE:
            filled.append([[] for _ in files])
            size = 0
        filled[-1][number].append(path)
        size += path.stat().st_size
    return list(filled)


def file_and_row(files: Files, wanted: pl.Expr) -> str:
    """File and row of the last row that `wanted` selects: of several copies, the one that a user should remove."""
    place = ""
    for path in itertools.chain(*files):
        rows = (
            pl.scan_parquet(path, row_index_name="row", glob=False).filter(wanted).select(pl.col("row").max()).collect()
        )
        if rows.item() is not None:
            place = f"{path}, row {rows.item()}"
    return place
