"""The results of a run as others take them: which run a directory belongs to, and that its files are whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefpipe.errors import DataError
from prefpipe.runs import commits

FOLDERS = ("adapter", "model", "merged")  # of a run of `train`


def place_of(directory: Path) -> tuple[Path, str]:
    """The run that a directory is, with "", or that it is the adapter or the model of, or that made the best policy of
    its rounds (`best` is the link in a run of `iterate`), with the name of that folder."""
    best = directory / "best"
    place = (best if best.is_symlink() else directory).resolve()
    if best.is_symlink() or (place.name in FOLDERS and (place.parent / "config.json").is_file()):
        return place.parent, place.name
    return directory, ""


def check_files(run_dir: Path, manifest: Mapping[str, Any], place: str) -> list[str]:
    """The names of the files in a folder of a complete run, or of the file of that name.

    Raises DataError where one is missing or has other bytes than the manifest says.
    """
    names = sorted(name for name in manifest["files"] if name == place or name.startswith(f"{place}/"))
    for name in names:
        if not commits.matches(run_dir / name, manifest["files"][name]["blake3"]):
            raise DataError(
                f"{run_dir / name} is damaged or missing: its bytes do not match the digest in the manifest",
                f"run the command that made {run_dir} again: it makes the file anew",
            )
    return names
