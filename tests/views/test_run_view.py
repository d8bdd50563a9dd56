"""The state of a run directory is read, whatever state it is in, and nothing is written."""

import json
import shutil
from pathlib import Path

import pytest

from prefpipe.errors import DataError, MissingInputError
from prefpipe.runs import fsio
from prefpipe.views import run_view
from tests.views.conftest import LETTERS


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in root.rglob("*")}


def test_a_complete_run(runs: Path) -> None:
    before = snapshot(runs)
    view = run_view.view(runs / "g")
    assert (view.command, view.state, view.problem) == ("generate", "complete", "")
    assert view.rows == {"completions": 18, "dropped": 0, "prompts": 6, "ref_logps": 18, f"rewards/{LETTERS}": 18,
                         "rewards/short_sentence": 18}  # fmt: skip
    assert view.totals["completions"] == 18
    assert view.inputs["prompts"]
    assert view.digest == json.loads((runs / "g/manifest.json").read_text())["digest"]
    assert view.bytes == sum(p.stat().st_size for p in (runs / "g").rglob("*") if p.is_file())
    assert snapshot(runs) == before


def test_a_run_without_its_manifest_is_unfinished_and_running_while_it_is_held(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "g", tmp_path / "g")
    (tmp_path / "g/manifest.json").unlink()
    view = run_view.view(tmp_path / "g")
    assert view.state == "unfinished"
    assert view.rows["completions"] == 18
    assert view.inputs["prompts"] == run_view.view(runs / "g").inputs["prompts"]
    with fsio.lock(tmp_path / "g"):
        assert run_view.view(tmp_path / "g").state == "running"
    assert run_view.view(tmp_path / "g").state == "unfinished"


@pytest.mark.parametrize("name", ["manifest.json", "config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff"])
def test_a_damaged_record_is_said_and_no_error(runs: Path, tmp_path: Path, name: str, content: bytes) -> None:
    shutil.copytree(runs / "g", tmp_path / "g")
    (tmp_path / "g" / name).write_bytes(content)
    view = run_view.view(tmp_path / "g")
    assert view.state == ("complete" if name == "config.json" else "unfinished")
    assert name in view.problem
    assert view.rows["completions"] == 18


def test_a_run_whose_records_are_all_damaged_is_listed_as_such(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "g", tmp_path / "g")
    for name in ("manifest.json", "config.json"):
        (tmp_path / "g" / name).write_bytes(b"{")
    assert [(run.state, run.command) for run in run_view.below(tmp_path)] == [("damaged", "?")]


def test_a_shard_without_a_record_does_not_count(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "g", tmp_path / "g")
    (tmp_path / "g/manifest.json").unlink()
    (tmp_path / "g/completions/part-00000.ok.json").unlink()
    assert "completions" not in run_view.view(tmp_path / "g").rows


@pytest.mark.parametrize(
    ("text", "step"),
    [("", None), ('{"step": 1}\n{"step": 2}\n', 2), ('{"step": 1}\n{"step": 2, "lo', 1), ("x\n" * 9, None),
     ('{"step": 3}\n' + '{"a": "' + "b" * 200_000, None)],
)  # fmt: skip
def test_the_last_step_is_the_last_whole_line(runs: Path, tmp_path: Path, text: str, step: int | None) -> None:
    shutil.copytree(runs / "p", tmp_path / "t")
    (tmp_path / "t/metrics.jsonl").write_text(text)
    assert run_view.view(tmp_path / "t").last_step.get("step") == step


def test_runs_are_found_at_any_depth_but_not_in_quarantine(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "p", tmp_path / "a/b/c")
    shutil.copytree(runs / "p", tmp_path / "a/b/c/inner")
    shutil.copytree(runs / "p", tmp_path / "a/quarantine/old")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [run.path for run in run_view.below(tmp_path)] == [tmp_path / "a/b/c", tmp_path / "a/b/c/inner"]


def test_a_directory_without_a_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run of prefpipe"):
        run_view.view(tmp_path)
    with pytest.raises(MissingInputError, match="does not exist"):
        run_view.view(tmp_path / "nowhere")
