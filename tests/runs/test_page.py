"""The page of a run that goes on: written by another process; what keeps it from being written is a warning."""

import importlib.util
from pathlib import Path

import pytest

from prefpipe.errors import MissingInputError, to_install
from prefpipe.runs import page
from tests.runs.cases import opened, write


@pytest.mark.slow
def test_the_page_of_a_run_that_this_process_holds(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        page.write(run.out)
        assert "run is running" in (run.out / "report.html").read_text()
        manifest = write(run)
    assert "report.html" not in manifest["files"]


@pytest.mark.slow
def test_a_page_that_cannot_be_written_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page.write(tmp_path / "nowhere")
    assert "could not be written: error:" in capsys.readouterr().err.replace("\n", " ")


def test_a_missing_package_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    page.check_installed()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(MissingInputError) as caught:
        page.check_installed()
    assert caught.value.hint == to_install("report")
