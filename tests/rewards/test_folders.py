"""Folders that a program leaves: what they hold, and their removal."""

import math
import os
from pathlib import Path

import pytest

from prefpipe.rewards import folders


def nest(folder: Path, depth: int, name: str) -> None:
    """Folders in folders, as a program makes them: step by step, since no path would be short enough."""
    here = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=here)
        inner = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=inner))
        os.close(here)
        here = inner
    os.close(here)


@pytest.mark.parametrize(("depth", "name"), [(1, "d"), (3000, "d"), (100, "n" * 200)])
def test_a_folder_of_any_depth_is_removed(tmp_path: Path, depth: int, name: str) -> None:
    (tmp_path / "job").mkdir()
    nest(tmp_path / "job", depth, name)
    folders.remove_tree(str(tmp_path / "job"))
    assert list(tmp_path.iterdir()) == []


def test_what_links_lead_to_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    job = tmp_path / "job"
    (job / "a" / "b").mkdir(parents=True)
    for number, target in enumerate((tmp_path / "mine", job, "nowhere", "/")):
        (job / f"link-{number}").symlink_to(target)
        (job / "a" / "b" / f"link-{number}").symlink_to(target)
    os.mkfifo(job / "a" / "pipe")
    (job / "a" / "b").chmod(0)
    (job / "a").chmod(0)
    folders.remove_tree(str(job))
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine" / "file").exists()


def test_used_bytes_count_content_names_and_deleted_files_that_are_open(tmp_path: Path) -> None:
    assert folders.used_bytes(str(tmp_path), "") == 0
    (tmp_path / "a").write_bytes(bytes(1 << 20))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "linked").hardlink_to(tmp_path / "a")
    (tmp_path / "b" / "out").symlink_to("/usr")
    used = folders.used_bytes(str(tmp_path), "")
    assert (1 << 20) + 4 * 4096 <= used < (1 << 20) + 40 * 4096
    with (tmp_path / "gone").open("wb") as gone:
        (tmp_path / "gone").unlink()
        before = folders.used_bytes(str(tmp_path), str(os.getpid()))
        gone.write(bytes(1 << 20))
        gone.flush()
        assert folders.used_bytes(str(tmp_path), str(os.getpid())) >= before + (1 << 20)
    assert folders.used_bytes(str(tmp_path / "nowhere"), "999999999") == 0


def test_a_path_that_is_too_long_to_list_is_infinite(tmp_path: Path) -> None:
    nest(tmp_path, 30, "n" * 200)
    assert folders.used_bytes(str(tmp_path), "") == math.inf
    (tmp_path / "job").mkdir()
    (tmp_path / ("n" * 200)).rename(tmp_path / "job" / "n")
    folders.remove_tree(str(tmp_path / "job"))
