"""The summary shows every round, which is the best, what stopped them, and paths that exist."""

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
