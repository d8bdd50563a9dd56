"""The page of a run that goes on: written by another process; what keeps it from being written is a warning."""

import importlib.util
import os
from pathlib import Path

import pytest

from prefpipe import extras, processes
from prefpipe.errors import MissingInputError
from prefpipe.runs import page
from tests.runs.cases import opened, write
from tests.waiting import PATIENCE_S


@pytest.mark.slow
def test_the_page_of_a_run_that_this_process_holds(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        page.write(run.out)
        assert "run is running" in (run.out / "report.html").read_text()
        manifest = write(run)
    assert "report.html" not in manifest["files"]


@pytest.mark.slow
def test_a_run_goes_on_while_its_page_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One writer at a time, at the lowest priority; the page at the end is of the run as it is then."""
    started: list[int] = []
    begin = page._begin

    def counted(run_dir: Path) -> None:
        begin(run_dir)
        started.append(os.getpriority(os.PRIO_PROCESS, page._writers[run_dir].process.pid))

    monkeypatch.setattr(page, "_begin", counted)
    with opened(tmp_path / "run") as run:
        page.renew(run.out)
        writer = page._writers[run.out].process
        page.renew(run.out)
        assert page._writers[run.out].process is writer
        assert writer.wait(PATIENCE_S) == 0
        assert "run is running" in (run.out / "report.html").read_text()
        write(run)
    page.write(tmp_path / "run")
    assert "run is running" not in (tmp_path / "run/report.html").read_text()
    assert started == [19, 19]
    assert page._writers == {}


def test_a_page_that_takes_too_long_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "python", lambda *_words: ["sleep", "60"])
    monkeypatch.setattr(page, "_SECONDS", 0.0)
    page.write(tmp_path)
    assert "it took longer than 0 s" in capsys.readouterr().err
    monkeypatch.setattr(processes, "python", lambda *_words: [str(tmp_path / "no-such-program")])
    page.renew(tmp_path)
    assert "No such file" in capsys.readouterr().err
    assert page._writers == {}


@pytest.mark.slow
def test_a_page_that_cannot_be_written_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page.write(tmp_path / "nowhere")
    assert "could not be written: error:" in capsys.readouterr().err.replace("\n", " ")


def test_a_missing_package_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    page.check_installed()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(MissingInputError) as caught:
        page.check_installed()
    assert caught.value.hint == extras.hint("report")
