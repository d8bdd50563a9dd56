"""Parts of score as one run: each shard is a file of the part that its number belongs to."""

from collections.abc import Sequence

from prefpipe.errors import DataError
from prefpipe.runs import commits
from prefpipe.runs.store import Run
from prefpipe.stages.gather.parts import Part


def place(parts: Sequence[Part], run: Run) -> None:
    """Let every shard of a part be one of the run, without a copy where the file system has links. Shards have the
    numbers of the whole run.

    Raises DataError for a damaged file, and where a number is missing or stands in another part.
    """
    found: set[int] = set()
    for part in parts:
        for name in sorted(name for name in part.manifest["files"] if "/" in name and name.endswith(".parquet")):
            dataset, _, file = name.rpartition("/")
            index = int(file.removesuffix(".parquet").removeprefix("part-"))
            if index % part.count != part.number - 1:
                raise DataError(f"{part.directory / name} is no shard of part {part.name}", "make that part again")
            found.add(index)
            source, digest = part.directory / name, part.manifest["files"][name]["blake3"]
            if not run.has_shard([dataset], index, commits.rows_of(source)):
                owner = {"fingerprint": run.shard_fingerprint, "name": name}
                commits.adopt(source, run.part(dataset, index), digest, owner)
    lacking = {*range(max(found, default=-1) + 1)} - found
    if lacking:
        raise DataError(f"no part has shard {min(lacking)}", "make the parts again")
