"""Checkpoints: complete or invisible, verified before use, the newest good one wins, damaged ones are kept aside."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prefpipe.errors import StorageError
from prefpipe.runs import fsio
from prefpipe.stages.train.checkpoint import Checkpoint, newest, save


def at(step: int) -> Checkpoint:
    return Checkpoint(
        step, 100 * step, {"master/w": torch.full((3,), float(step)), "step/w": torch.tensor(float(step))}
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


def same(found: Checkpoint | None, wanted: Checkpoint) -> bool:
    return (
        found is not None
        and (found.step, found.metrics_bytes) == (wanted.step, wanted.metrics_bytes)
        and found.tensors.keys() == wanted.tensors.keys()
        and all(torch.equal(found.tensors[k], wanted.tensors[k]) for k in wanted.tensors)
    )


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_nothing_to_resume_from(folder: Path):
    assert newest(folder, "f") is None
    folder.mkdir(parents=True)
    assert newest(folder, "f") is None


def test_the_newest_by_step_wins_and_two_are_kept(folder: Path):
    """By number, not by name as text or by time: 100 is newer than 20 and 3, and the two newest stay."""
    for step in (3, 20, 100):
        save(folder, at(step), "f")
    assert names(folder) == ["step-00000020", "step-00000100"]
    assert same(newest(folder, "f"), at(100))


def test_non_contiguous_tensors_are_saved(folder: Path):
    wanted = torch.arange(6.0).reshape(2, 3).T
    save(folder, Checkpoint(1, 0, {"w": wanted}), "f")
    found = newest(folder, "f")
    assert found is not None
    assert torch.equal(found.tensors["w"], wanted)


def test_what_the_alert_rules_remember_comes_back(folder: Path):
    state = {"blocks": {"loss": [0.1, None]}, "active": ["A2"]}
    save(folder, Checkpoint(1, 0, at(1).tensors, state), "f")
    found = newest(folder, "f")
    assert found is not None
    assert found.diagnostics == state


def test_saving_a_step_again_keeps_what_is_there(folder: Path):
    save(folder, at(1), "f")
    save(folder, Checkpoint(1, 7, at(9).tensors), "f")
    assert same(newest(folder, "f"), at(1))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, empty, Path.unlink])
@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
def test_a_damaged_one_moves_to_quarantine_and_the_older_is_used(
    folder: Path, file: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
):
    for step in (1, 2):
        save(folder, at(step), "f")
    damage(folder / "step-00000002" / file)
    assert same(newest(folder, "f"), at(1))
    assert names(folder) == ["step-00000001"]
    assert names(folder.parent / "quarantine") == ["step-00000002"]
    assert "step-00000002 is damaged" in capsys.readouterr().err


def test_every_single_byte_of_the_record_counts(folder: Path):
    """One flipped bit anywhere in state.json: the same checkpoint comes back, or the older one; never a third thing.

    A wrong step would skip or repeat data, a wrong metrics_bytes would cut metrics.jsonl in the wrong place.
    """
    wrong: list[str] = []
    save(folder, at(1), "f")
    save(folder, at(4), "f")
    path = folder / "step-00000004" / "state.json"
    original = path.read_bytes()
    for position in range(len(original)):
        path.parent.mkdir(exist_ok=True)
        damaged = bytearray(original)
        damaged[position] ^= 1
        path.write_bytes(bytes(damaged))
        try:
            found = newest(folder, "f")
        except Exception as error:
            wrong.append(f"byte {position} ({original[position : position + 1]!r}): {error!r}")
            continue
        if not (same(found, at(4)) or same(found, at(1))):
            wrong.append(f"byte {position}: resumed at {found and (found.step, found.metrics_bytes)}")
        aside = folder.parent / "quarantine" / "step-00000004"
        if aside.exists():
            aside.rename(path.parent) if not path.parent.exists() else None
    assert not wrong, f"{original.decode()}: {wrong}"


def test_both_damaged_is_a_start_from_zero_with_both_kept_aside(folder: Path):
    for step in (1, 2):
        save(folder, at(step), "f")
        flip(folder / f"step-{step:08d}" / "state.safetensors")
    assert newest(folder, "f") is None
    assert names(folder.parent / "quarantine") == ["step-00000001", "step-00000002"]


def test_another_runs_checkpoint_is_not_used(folder: Path):
    save(folder, at(1), "mine")
    save(folder, at(2), "other")
    assert same(newest(folder, "mine"), at(1))


def test_half_written_ones_are_invisible(folder: Path):
    """What a killed writer leaves: a temporary directory, which is no checkpoint and does not push good ones out."""
    save(folder, at(1), "f")
    half = folder / ".step-00000002.4711.tmp"
    half.mkdir()
    (half / "state.safetensors").write_bytes(b"half")
    assert same(newest(folder, "f"), at(1))
    save(folder, at(3), "f")
    assert names(folder) == [half.name, "step-00000001", "step-00000003"]


@pytest.mark.parametrize("point", ["write", "fsync", "rename"])
def test_a_failed_save_leaves_the_older_one(folder: Path, point: str, monkeypatch: pytest.MonkeyPatch):
    save(folder, at(1), "f")
    passed = fsio._passes[point]
    monkeypatch.setenv("PREFPIPE_FAULT", f"{point}:{passed + 1}:enospc")
    with pytest.raises(StorageError, match="no space left"):
        save(folder, at(2), "f")
    monkeypatch.delenv("PREFPIPE_FAULT")
    assert names(folder) == ["step-00000001"]
    save(folder, at(2), "f")
    assert same(newest(folder, "f"), at(2))


def test_the_record_says_what_it_is(folder: Path):
    save(folder, at(5), "f")
    record = json.loads((folder / "step-00000005" / "state.json").read_text())
    assert (record["step"], record["metrics_bytes"], record["fingerprint"]) == (5, 500, "f")
