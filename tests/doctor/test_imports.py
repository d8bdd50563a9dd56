"""A package that cannot be imported: what is in its way is named, whatever it does."""

import sys
from pathlib import Path

import pytest

from prefpipe.doctor import imports
from tests.doctor.stand_ins import LIBRARY, write


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("harm", "error"),
    [
        ("raise RuntimeError('operator wavelets::nms does not exist')", "RuntimeError: operator wavelets::nms"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "died of SIGSEGV"),
        ("import sys\nsys.exit(3)", "exit code 3"),
        ("raise OSError('Could not load this library: wavelets/lib.so')", "OSError: Could not load"),
    ],
)
def test_the_package_in_the_way_is_named(folder: Path, harm: str, error: str) -> None:
    if "sys.exit" in harm:  # it leaves no traceback: the package is then only known by its own words
        harm = "import sys\nprint('wavelets cannot be used', file=sys.stderr)\nsys.exit(3)"
    write(folder, {**LIBRARY, "wavelets.py": harm})
    (found,) = imports.findings(["transformers"])
    assert (found.state, found.do) == ("fail", "pip uninstall wavelets")
    assert error in found.what


def test_several_in_the_way_are_named_and_no_bystander(folder: Path) -> None:
    """`filters` reads `wavelets` and lives without; `audio` breaks once `wavelets` is away."""
    write(folder, {
        **LIBRARY,
        "transformers/__init__.py": "import filters\ntry:\n    import audio\nexcept ImportError:\n    pass\n"
        "AutoModelForCausalLM = 1\n",
        "filters.py": "try:\n    import wavelets\nexcept ImportError:\n    pass\n",
        "wavelets.py": "raise RuntimeError('broken')",
        "audio.py": "raise OSError('broken too')",
    })  # fmt: skip
    (found,) = imports.findings(["transformers"])
    assert found.do == "pip uninstall wavelets audio"
    assert "prefpipe needs none of them" in found.what


def test_what_one_package_needs_away_is_away_for_the_next(folder: Path) -> None:
    write(folder, {**LIBRARY, "peft.py": "import transformers\n", "wavelets.py": "raise RuntimeError('broken')"})
    found = imports.findings(["transformers", "peft"])
    assert [f.do for f in found] == ["pip uninstall wavelets"] * 2


def test_a_package_that_is_broken_itself_is_installed_again(folder: Path) -> None:
    write(folder, {"transformers/__init__.py": "def half(:\n"})
    (found,) = imports.findings(["transformers"])
    assert (found.state, found.do) == ("fail", "pip install --force-reinstall transformers")
    assert "SyntaxError" in found.what


def test_whole_and_missing_packages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, {"vllm.py": "LLM = SamplingParams = 1\n"})
    monkeypatch.setitem(sys.modules, "peft", None)
    peft, vllm = imports.findings(["peft", "vllm"])
    assert (peft.state, vllm.state) == ("absent", "ok")
    assert peft.do
