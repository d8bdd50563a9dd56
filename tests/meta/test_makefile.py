"""What `make` would do: which lock an environment is installed from, and the progress of the installation."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(venv: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`make` as from a shell, also where these tests are run by `make test`, which hands itself down."""
    handed_down = ("LOCK", "VENV", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")
    environment = {name: value for name, value in os.environ.items() if name not in handed_down}
    return subprocess.run(
        ["make", f"VENV={venv}", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def dry_run(venv: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return make(venv, "-n", *words)


def locks(venv: Path, *words: str) -> set[str]:
    """The locks that would be installed."""
    done = dry_run(venv, *words)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"-r requirements/(cpu|cuda)\.txt", done.stdout))


@pytest.mark.parametrize("target", ["demo", "test", "setup", "bench"])
def test_an_environment_keeps_its_lock(tmp_path: Path, target: str) -> None:
    assert locks(tmp_path, target) == {"cpu"}
    assert locks(tmp_path, target, "LOCK=cuda") == {"cuda"}
    stamp = tmp_path / "installed-cuda"
    stamp.touch()
    assert locks(tmp_path, target) == set()
    os.utime(stamp, (0, 0))  # older than its lock: installed again, from the same one
    assert locks(tmp_path, target) == {"cuda"}


def test_another_lock_is_refused_and_nothing_removed(tmp_path: Path) -> None:
    (tmp_path / "installed-cuda").touch()
    done = make(tmp_path, "setup", "LOCK=cpu")
    assert done.returncode == 2
    assert f"error: {tmp_path} was installed from requirements/cuda.txt" in done.stderr
    assert "hint: make setup LOCK=cpu VENV=.venv-cpu" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["installed-cuda"]


def test_the_demo_is_the_command(tmp_path: Path) -> None:
    (tmp_path / "installed-cpu").touch()
    assert dry_run(tmp_path, "demo").stdout.split() == [f"{tmp_path}/bin/prefpipe", "demo"]


@pytest.mark.parametrize("line", ["Collecting", "Processing", "Requirement already satisfied:"])
def test_progress_reaches_its_total(tmp_path: Path, line: str) -> None:
    """Whether pip takes the packages from an index, from a folder of wheels or finds them installed."""
    whole = dry_run(tmp_path, "setup").stdout.replace("\\\n", "")
    count = next(part for part in re.findall(r"\| (awk .*fflush\(\) }')", whole))
    packages = re.findall(r"^[a-z].*==", (ROOT / "requirements" / "cpu.txt").read_text(), re.MULTILINE)
    said = "".join(f"{line} name\n  Downloading name.whl\n" for _ in packages)
    done = subprocess.run(["bash", "-c", count], cwd=ROOT, input=said, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == [str(len(packages)), "of", str(len(packages)), "packages"]
