"""`prefpipe report`: a page for every run and every state of it, and errors with codes for what is none."""

import json
import shutil
from pathlib import Path

import pytest

from prefpipe.stages.report import data, stage
from tests.conftest import Call
from tests.stages.report import cases

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["", *(f"round-1/{command}" for command in ("generate", "build-pairs", "train", "evaluate"))]
)
def test_every_command_has_a_page(finished: Path, tmp_path: Path, name: str) -> None:
    page = stage.run(finished / name, tmp_path / "page.html").read_text()
    assert "could not be made" not in page
    assert page.count("<section") == 6


def test_the_command_line(finished: Path, tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    assert call("report", copy).code == 0
    assert (copy / "report.html").read_text().startswith("<!doctype html>")
    assert call("report", copy, "--out", tmp_path / "deep/page.html").code == 0
    assert (tmp_path / "deep/page.html").is_file()
    missing = call("report", tmp_path / "nowhere")
    assert (missing.code, missing.stderr.count("\n")) == (66, 2)
    assert "nowhere does not exist" in missing.stderr
    assert call("report", tmp_path).code == 65
    assert call("report", "hf://x/y").code == 2
    assert call("report", copy, "--out", "/proc/page.html").code == 74
    assert call("report").code == 2


def test_a_run_with_a_page_in_it_is_complete_and_resumes(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    stage.run(copy, None)
    stage.run(copy / "round-1/train", None)
    cases.write_again(copy)


def test_what_a_kill_left_has_a_page(finished: Path, tmp_path: Path) -> None:
    """Manifests, logs and files go one after another, and the page says what is missing."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    for owner in copy.rglob(".owner"):
        owner.unlink()  # they name this process, which lives
    page = tmp_path / "page.html"
    (copy / "round-1/train/metrics.jsonl").write_text('{"step": 0, "loss": 0.7}\n{"step": 1, "lo')
    for victim in ("manifest.json", "round-2/evaluate", "round-2/train/manifest.json", "round-1/generate/completions",
                   "round-2/build-pairs/pairs/part-00000.parquet", "round-1/build-pairs/manifest.json"):  # fmt: skip
        path = copy / victim
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if path.name == "manifest.json":
            text = stage.run(copy, page).read_text()
            assert "could not be made" not in text, victim
            assert "is not complete" in text
    assert "part-00000.parquet" in text
    assert "No such file" in text


def test_an_empty_start_has_a_page(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"command": "iterate", "config": {"rounds": 1}, "identity": {}}))
    text = stage.run(run, None).read_text()
    assert "could not be made" not in text
    assert "5 steps are not started" in text


@pytest.mark.parametrize("manifest", ["", "{", "[]", '{"command": 3}'])
def test_a_damaged_manifest_has_a_page(finished: Path, tmp_path: Path, manifest: str) -> None:
    copy = tmp_path / "train"
    shutil.copytree(finished / "round-1/train", copy)
    (copy / "manifest.json").write_text(manifest)
    text = stage.run(copy, None).read_text()
    assert "could not be made" not in text
    assert "manifest.json" in text


def test_a_section_that_fails_does_not_take_the_page_with_it(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data, "MOST_ROWS", "many")  # any mistake
    text = stage.run(finished, tmp_path / "page.html").read_text()
    assert text.count("This part could not be made: TypeError") == 1
    assert "section 'data' could not be made" in capsys.readouterr().err


def test_a_large_run_is_a_small_page(tmp_path: Path) -> None:
    run = cases.iterate_run(tmp_path / "run", cases.Shape(rounds=1, prompts=400, pairs=2000, steps=3000))
    assert stage.run(run, tmp_path / "page.html").stat().st_size < 5_000_000
