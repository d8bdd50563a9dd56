"""Whether runs are all parts of one command."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from prefpipe.errors import DataError, UsageError
from prefpipe.ids import content_id
from prefpipe.inference.cutting import part_of
from prefpipe.inputs import files
from prefpipe.runs import saved_config, store
from prefpipe.runs.store import Manifest
from prefpipe.schemas import VERSION

_SETTING = {"generate": "prompts", "score": "inputs", "evaluate": "prompts"}  # of what each command takes its part
_AGAIN = "make that part again with the settings of the others"


@dataclass(frozen=True)
class Part:
    """A complete run of part `number` of `count`: its manifest, and what its config.json holds."""

    directory: Path
    number: int
    count: int
    manifest: Manifest
    saved: Mapping[str, Any]

    @property
    def command(self) -> str:
        """The command that made it."""
        return self.manifest["command"]

    @property
    def name(self) -> str:
        """I/N."""
        return f"{self.number}/{self.count}"


def read(directories: Sequence[Path], out: Path) -> list[Part]:
    """The runs in the order of their parts, 1 to N; their files are checked when they are read.

    Raises MissingInputError for a run that is not complete, UsageError where one is no part, lies in `out` or around
    it, where a part is missing or there twice, and where settings, inputs or versions differ; DataError for a damaged
    run, and where an input is another one by now.
    """
    for directory in directories:
        _check_apart(directory.resolve(), out.resolve())
    found = sorted(map(_read, directories), key=lambda part: part.number)
    first = found[0]
    for part in found[1:]:
        _check_alike(first, part)
    numbers = [part.number for part in found]
    twice = [part.name for one, part in pairwise(found) if one.number == part.number]
    if twice:
        raise UsageError(f"part {twice[0]} is there twice", "give the run of each part once")
    missing = sorted({*range(1, first.count + 1)}.difference(numbers))
    if missing:
        names = ", ".join(f"{number}/{first.count}" for number in missing)
        raise UsageError(f"no run of part {names}", "give the runs of all parts; make those that are missing")
    _check_inputs(first)
    return found


def _read(directory: Path) -> Part:
    manifest = store.read_manifest(directory)
    command = manifest["command"]
    saved = saved_config.read(directory / "config.json", force=False)
    if saved is None:
        raise DataError(f"{directory} has no config.json", "make that part again")
    if command not in _SETTING or saved["config"].get("part", "1/1") == "1/1":
        raise UsageError(
            f"{directory} is no part of a run of generate, score or evaluate (`{command}` made it)",
            "give runs that were made with --part I/N",
        )
    if manifest["fingerprint"] != content_id(saved_config.identity(saved)):
        raise DataError(f"{directory}: config.json and manifest.json are of two runs", "make that part again")
    if saved["identity"]["schema"] != VERSION or "row_inputs" not in saved:
        raise UsageError(f"{directory} was made by an older version of prefpipe", "make that part again")
    return Part(directory, *part_of(saved["config"]["part"]), manifest, saved)


def _check_apart(directory: Path, out: Path) -> None:
    if directory == out or directory in out.parents or out in directory.parents:
        raise UsageError(f"--out {out} and the part {directory} lie in each other", "choose another --out")


def _check_alike(first: Part, other: Part) -> None:
    """Raise UsageError where two parts are not of one command; the message names what differs."""
    one, two = ({**saved_config.identity(part.saved), "part": f"I/{part.count}"} for part in (first, other))
    one["versions"], two["versions"] = first.manifest["versions"], other.manifest["versions"]
    if first.command == "score":  # the number of a shard is its place in the inputs
        one["shard_rows"], two["shard_rows"] = (part.saved["config"]["shard_rows"] for part in (first, other))
    differing = [key for key in sorted({*one, *two}) if one.get(key) != two.get(key)]
    if differing:
        listed = "; ".join(f"{key}: {one.get(key)!r} and {two.get(key)!r}" for key in differing)
        raise UsageError(f"{first.directory} and {other.directory} are no parts of one run: {listed}", _AGAIN)


def _check_inputs(part: Part) -> None:
    """Raise DataError where an input is not the one that the parts were made from."""
    setting = part.saved["config"][_SETTING[part.command]]
    named = {"prompts": setting} if isinstance(setting, str) else {f"inputs.{i}": s for i, s in enumerate(setting)}
    for name, source in named.items():
        if files.digest(source) != part.manifest["inputs"][name]:
            raise DataError(
                f"{source} is another one than the parts were made from", "put it back, or make the parts again"
            )
