"""The state of a run directory is read, whatever state it is in, and nothing is written."""

import json
import shutil
from pathlib import Path

import pytest

from prefpipe.errors import MissingInputError
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


def test_a_run_without_its_manifest_is_interrupted_and_running_while_it_is_held(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "g", tmp_path / "g")
    (tmp_path / "g/manifest.json").unlink()
    view = run_view.view(tmp_path / "g")
    assert view.state == "interrupted"
    assert view.rows["completions"] == 18
    assert view.inputs["prompts"] == run_view.view(runs / "g").inputs["prompts"]
    with fsio.lock(tmp_path / "g"):
        assert run_view.view(tmp_path / "g").state == "running"
    assert run_view.view(tmp_path / "g").state == "interrupted"


@pytest.mark.parametrize("name", ["manifest.json", "config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"command": "generate", "digest": "0"}'])
def test_a_damaged_record_is_a_state_and_not_an_error(runs: Path, tmp_path: Path, name: str, content: bytes) -> None:
    shutil.copytree(runs / "g", tmp_path / "g")
    (tmp_path / "g" / name).write_bytes(content)
    if name == "config.json" and content.startswith(b'{"command"'):
        with pytest.raises(MissingInputError, match="no run of prefpipe"):
            run_view.view(tmp_path / "g")
        return
    view = run_view.view(tmp_path / "g")
    assert view.state == "damaged"
    assert name in view.problem


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
    assert list(run_view.below(tmp_path)) == [tmp_path / "a/b/c", tmp_path / "a/b/c/inner"]


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_a_directory_without_a_run_is_said(tmp_path: Path, name: str) -> None:
    with pytest.raises(MissingInputError, match="does not exist" if name else "no run of prefpipe"):
        run_view.view(tmp_path / name)
