"""The wheel holds the recipes and prompts of the checkout, and works from an empty folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow
SHIPPED = ("data", "stages")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the files that git knows or would add: setuptools writes beside them."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "prefpipe", "README.md", "LICENSE",
         "pyproject.toml", *SHIPPED],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in listed.stdout.splitlines():
        source, target = ROOT / name, copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        elif source.is_file():
            target.write_bytes(source.read_bytes())
    done = subprocess.run([sys.executable, "-c", BUILD, out], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_it_holds_every_recipe_and_prompt(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        for folder in SHIPPED:
            files = [p for p in (ROOT / folder).rglob("*") if p.is_file() and p.parent != ROOT / "stages"]
            assert files
            for path in files:
                assert packed.read(f"prefpipe/shipped/{path.relative_to(ROOT)}") == path.read_bytes()
        names = packed.namelist()
    assert "prefpipe/stages/report/templates/page.html.jinja" in names
    assert all(name.startswith("prefpipe") for name in names)


def test_it_works_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    installed, folder = tmp_path / "installed", tmp_path / "empty"
    folder.mkdir()
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(installed)
    for arguments in (("recipes", "copy", "demo"), ("demo", "--dry-run")):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "prefpipe", *arguments], cwd=folder, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(installed)}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert str(installed) in done.stdout
    assert (folder / "stages" / "iterate" / "demo.toml").is_file()
