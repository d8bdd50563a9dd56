"""A link of a run is replaced whole, moves with its target, and takes the place of nothing else."""

import shutil
from pathlib import Path

import pytest

from prefpipe.errors import UsageError
from prefpipe.runs import fsio, links


@pytest.fixture
def out(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "file").write_text(name)
    return tmp_path / "out"


def test_a_link_leads_to_its_target_and_moves_with_it(out: Path) -> None:
    links.publish(out / "best", out / "one")
    links.publish(out / "best", out / "two")
    links.publish(out / "best", out / "two")
    assert (out / "best" / "file").read_text() == "two"
    assert not list(out.glob(".*"))
    shutil.move(out, out.with_name("moved"))
    assert (out.with_name("moved") / "best" / "file").read_text() == "two"


def test_what_is_no_link_stays(out: Path) -> None:
    with pytest.raises(UsageError, match="is no link of this run"):
        links.publish(out / "one", out / "two")
    links.withdraw(out / "one")
    links.withdraw(out / "absent")
    assert (out / "one" / "file").read_text() == "one"
    links.publish(out / "best", out / "one")
    links.withdraw(out / "best")
    assert not (out / "best").is_symlink()


def test_what_a_kill_left_is_removed_and_its_target_stays(out: Path) -> None:
    """The temporary link of a process that was killed between making it and renaming it."""
    (out / ".best.4711.tmp").symlink_to("one")
    fsio.remove_leftovers(out)
    assert not (out / ".best.4711.tmp").is_symlink()
    assert (out / "one" / "file").exists()
