"""Which run a directory belongs to, and whether its files are whole."""

from pathlib import Path

import pytest

from prefpipe.errors import DataError
from prefpipe.runs import commits, trained


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for name in ("adapter", "merged"):
        (tmp_path / "t" / name).mkdir(parents=True)
        (tmp_path / "t" / name / "README.md").write_text(name)
    (tmp_path / "t" / "config.json").write_text("{}")
    return tmp_path / "t"


def test_a_run_its_folders_and_the_best_of_rounds(run_dir: Path, tmp_path: Path) -> None:
    assert trained.place_of(run_dir) == (run_dir, "")
    assert trained.place_of(run_dir / "merged") == (run_dir, "merged")
    (tmp_path / "rounds").mkdir()
    (tmp_path / "rounds" / "best").symlink_to("../t/adapter")
    assert trained.place_of(tmp_path / "rounds") == (run_dir, "adapter")
    (run_dir / "config.json").unlink()  # a folder that happens to have the name of one
    assert trained.place_of(run_dir / "merged") == (run_dir / "merged", "")


def test_files_are_those_of_the_manifest(run_dir: Path) -> None:
    names = ("adapter/README.md", "merged/README.md", "adapter-notes.txt")
    (run_dir / names[2]).write_text("of no folder")
    manifest = {"files": {name: commits.describe(run_dir / name) for name in names}}
    assert trained.check_files(run_dir, manifest, "adapter") == ["adapter/README.md"]
    assert trained.check_files(run_dir, manifest, names[2]) == [names[2]]
    (run_dir / names[0]).write_text("other bytes")
    with pytest.raises(DataError, match="damaged or missing"):
        trained.check_files(run_dir, manifest, "adapter")
    assert trained.check_files(run_dir, manifest, "merged") == ["merged/README.md"]
