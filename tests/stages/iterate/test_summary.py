"""The summary shows every round, which is the best, what stopped them, and paths that exist."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from prefpipe.runs.store import Manifest
from prefpipe.stages.iterate import summary

STOP = {"rule": "gain", "round": 3, "why": ["round 2: +0.01", "round 3: -0.02"], "advice": "give new prompts"}


def with_totals(manifest: Manifest, **totals: Any) -> Manifest:
    return {**manifest, "totals": {**manifest["totals"], **totals}}


def best(number: int) -> dict[str, Any]:
    return {"round": number, "metric": "sampled.pass", "value": 0.625}


def shown(manifest: Manifest, out: Path) -> str:
    return "\n".join(summary.lines(manifest, out))


@pytest.mark.parametrize("number", [0, 2, 3])
def test_the_best_round_is_marked_and_its_policy_named(three: tuple[Path, Manifest], number: int) -> None:
    out, manifest = three
    text = shown(with_totals(manifest, best=best(number)), out)
    marked = [line.split("|")[1].strip() for line in text.splitlines() if "(best)" in line]
    assert marked == [f"{number or 'start'} (best)"]
    if number == 0:
        assert "no round is above it" in text
        assert "policy       the model before training" in text
    else:
        assert f"best: round {number}, sampled.pass 0.625" in text
        line = next(line for line in text.splitlines() if line.startswith("policy"))
        assert Path(line.split()[1]).exists()


def test_what_stopped_the_rounds_is_said_with_what_to_do_next(three: tuple[Path, Manifest]) -> None:
    out, manifest = three
    text = shown(with_totals(manifest, best=best(1), stopped=STOP), out)
    assert "stopped after round 3 by rule gain:\n  round 2: +0.01\n  round 3: -0.02\n  next: give new prompts" in text
    assert "without 'gain' in stop.rules" in text
    assert "more rounds" not in text
    assert "more rounds  the same command with --rounds 4" in shown(with_totals(manifest, best=best(1)), out)


def test_a_run_of_an_older_version_has_no_best_round(three: tuple[Path, Manifest]) -> None:
    out, manifest = three
    old = {**manifest, "totals": {"rounds": manifest["totals"]["rounds"]}}
    text = shown(old, out)
    assert "best" not in text
    assert f"policy       {out}/round-3/train/adapter" in text


def test_other_paths_exist_and_answers_are_shown(three: tuple[Path, Manifest]) -> None:
    out, manifest = three
    text = shown(manifest, out)
    assert "> Name a moss." in text
    assert "2 held-out prompts" in text
    for word in ("metrics", "replay"):
        line = next(line for line in text.splitlines() if line.startswith(word))
        path = next(part for part in line.split() if part.startswith(str(out)))
        assert Path(path).exists(), line


def test_the_seconds_of_every_step_stand_in_a_table(three: tuple[Path, Manifest], tmp_path: Path) -> None:
    """A step that ran twice counts twice; a step of other rounds is an empty cell; a torn line counts nothing."""
    out, manifest = three
    head, _, *rows = _cells(shown(manifest, out), "seconds")
    assert head == ["seconds", "generate", "build-pairs", "train", "evaluate"]
    assert [row[0] for row in rows] == ["start", "1", "2", "3", "all"]
    assert rows[0][1:4] == ["", "", ""]
    assert all(cell.isdigit() for row in rows[1:] for cell in row[1:])
    noted = {"round-0/evaluate": 7.4, "round-2/replay": 3, "round-2/train": 10, "round-1/train": 20.4}
    lines = [{"event": "step", "step": step, "seconds": s} for step, s in (*noted.items(), ("round-2/train", 5))]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"event": "rounds", "seconds": 99}])
    copy = tmp_path / "out"
    shutil.copytree(out, copy, symlinks=True)
    (copy / "timing.jsonl").write_text(text + '{"event": "ste')
    head, _, *rows = _cells(shown(manifest, copy), "seconds")
    assert head == ["seconds", "replay", "train", "evaluate"]
    assert rows == [
        *(["start", "", "", "7"], ["1", "", "20", ""], ["2", "3", "15", ""], ["3", "", "", ""]),
        ["all", "3", "35", "7"],
    ]
    (copy / "timing.jsonl").unlink()
    assert "| seconds" not in shown(manifest, copy)


def _cells(text: str, first: str) -> list[list[str]]:
    """The table whose first cell is `first`."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} "))
    end = next(i for i in range(start, len(lines)) if not lines[i])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]
