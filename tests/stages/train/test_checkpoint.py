"""Checkpoints: complete or invisible, verified before use, the newest good one wins, damaged ones are kept aside."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file

from prefpipe.errors import StorageError
from prefpipe.forward.shards import whole
from prefpipe.runs import fsio, manifests
from prefpipe.stages.train import checkpoint
from prefpipe.stages.train.checkpoint import Checkpoint, save

METRICS = b"".join(b'{"step": %d, "loss": %d}\n' % (i, i * i) for i in range(120))


def ends_at(step: int) -> int:
    """Bytes of the first lines of METRICS, one for every step."""
    return sum(map(len, METRICS.splitlines(keepends=True)[:step]))


def at(step: int) -> Checkpoint:
    size = ends_at(step)
    tensors = {"master/w": torch.full((3,), float(step)), "step/w": torch.tensor(float(step))}
    return Checkpoint(step, size, blake3(METRICS[:size]).hexdigest()[:32], tensors)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_bytes(METRICS)
    return tmp_path / "run" / "checkpoints"


def newest(folder: Path, fingerprint: str) -> Checkpoint | None:
    return checkpoint.newest(folder, fingerprint, folder.parent / "metrics.jsonl")


def same(found: Checkpoint | None, wanted: Checkpoint) -> bool:
    return (
        found is not None
        and (found.step, found.metrics_bytes) == (wanted.step, wanted.metrics_bytes)
        and found.tensors.keys() == wanted.tensors.keys()
        and all(torch.equal(whole(found.tensors[k]), whole(wanted.tensors[k])) for k in wanted.tensors)
    )


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_nothing_to_resume_from(folder: Path):
    assert newest(folder, "f") is None
    folder.mkdir()
    assert newest(folder, "f") is None


def test_the_newest_by_step_wins_and_two_are_kept(folder: Path):
    """By number, not by name as text or by time: 100 is newer than 20 and 3, and the two newest stay."""
    for step in (3, 20, 100):
        save(folder, at(step), "f")
    assert names(folder) == ["step-00000020", "step-00000100"]
    assert same(newest(folder, "f"), at(100))


def test_non_contiguous_tensors_are_saved(folder: Path):
    wanted = torch.arange(6.0).reshape(2, 3).T
    save(folder, replace(at(1), tensors={"w": wanted}), "f")
    found = newest(folder, "f")
    assert found is not None
    assert torch.equal(whole(found.tensors["w"]), wanted)


def test_a_state_in_several_files(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Each with its digest; transformers' names; a bit of any of them counts."""
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 12)
    kinds = (torch.int32, torch.bfloat16, torch.float64, torch.bool)
    tensors = {f"w{i}": torch.arange(4).reshape(2, 2).to(kind) for i, kind in enumerate(kinds)}
    wanted = replace(at(3), tensors={**tensors, "none": torch.zeros(0, 5), "step": torch.tensor(7)})
    save(folder, at(1), "f")
    save(folder, wanted, "f")
    files = [name for name in names(folder / "step-00000003") if name != "state.json"]
    assert len(files) == 4
    assert files[0] == "state-00001-of-00004.safetensors"
    assert same(newest(folder, "f"), wanted)
    again = {k: v for file in files for k, v in load_file(folder / "step-00000003" / file).items()}
    assert all(torch.equal(again[k], v) and again[k].dtype == v.dtype for k, v in wanted.tensors.items())
    flip(folder / "step-00000003" / files[2])
    assert same(newest(folder, "f"), at(1))


def test_what_the_alert_rules_remember_comes_back(folder: Path):
    state = {"blocks": {"loss": [0.1, None]}, "active": ["A2"]}
    save(folder, replace(at(1), diagnostics=state), "f")
    found = newest(folder, "f")
    assert found is not None
    assert found.diagnostics == state


def test_saving_a_step_again_keeps_what_is_there(folder: Path):
    save(folder, at(1), "f")
    save(folder, replace(at(1), tensors=at(9).tensors), "f")
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
    assert (record["step"], record["metrics_bytes"], record["fingerprint"]) == (5, ends_at(5), "f")


def a_number(text: str) -> str:
    return text.replace('"loss": 9}', '"loss": 0}')  # of step 3


def a_line_less(text: str) -> str:
    return "".join(text.splitlines(keepends=True)[1:])


def a_flipped_bit(text: str) -> str:
    return text.replace('{"step": 0', '{"rtep": 0')


def no_json(text: str) -> str:
    return text.replace("{", "[", 1)


def nothing(_text: str) -> str:
    return ""


CHANGES = [(a_number, 2), (a_line_less, None), (a_flipped_bit, None), (no_json, None), (nothing, None)]


@pytest.mark.parametrize(("change", "left"), CHANGES)
def test_metrics_that_were_changed_are_not_gone_on_from(
    folder: Path, change: Callable[[str], str], left: int | None, capsys: pytest.CaptureFixture[str]
):
    """The newest checkpoint whose part of the metrics is as it was; the changed file is kept aside, once."""
    for step in (2, 4, 6):
        save(folder, at(step), "f", limit=3)
    metrics = folder.parent / "metrics.jsonl"
    metrics.write_text(change(METRICS.decode()))
    changed = metrics.read_bytes()
    found = newest(folder, "f")
    assert found is None if left is None else same(found, at(left))
    aside = names(folder.parent / "quarantine")
    assert [name for name in aside if "metrics" in name] == ["metrics.jsonl"]
    assert (folder.parent / "quarantine" / "metrics.jsonl").read_bytes() == changed
    assert "does not match metrics.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path)])
def test_no_file_in_the_place_of_the_metrics_is_a_start_from_zero(folder: Path, make: Callable[[Path], None]):
    save(folder, at(1), "f")
    (folder.parent / "metrics.jsonl").unlink()
    make(folder.parent / "metrics.jsonl")
    assert newest(folder, "f") is None


@pytest.mark.parametrize(("change", "left"), [(str, 4), *CHANGES[1:]])
def test_a_checkpoint_of_an_older_version_asks_for_a_line_for_every_step(
    folder: Path, change: Callable[[str], str], left: int | None
):
    """It has no digest of the metrics, and resumes where they can be those that it was saved with."""
    save(folder, at(4), "f")
    state = folder / "step-00000004" / "state.json"
    record = json.loads(state.read_text())
    record["blake3"] = record["files"]["state.safetensors"]
    for key in ("metrics_blake3", "best", "record_id", "files"):
        del record[key]
    state.write_text(json.dumps(manifests.sealed(record)))
    (folder.parent / "metrics.jsonl").write_text(change(METRICS.decode()))
    found = newest(folder, "f")
    assert (found and found.step) == left


def test_without_the_best_weights_so_far_an_earlier_checkpoint_is_used(folder: Path):
    for step, records in ((2, [2]), (4, [2, 4]), (5, [2, 4])):
        save(folder, at(step), "f", 3, records)
    flip(folder / "step-00000004" / "state.safetensors")
    assert same(newest(folder, "f"), at(2))
    assert names(folder.parent / "quarantine") == ["step-00000004", "step-00000005"]


def test_folders_with_other_names_are_left_alone(folder: Path):
    save(folder, at(1), "f")
    for name in ("step-best", "step-00000009.bak"):
        (folder / name).mkdir()
    assert same(newest(folder, "f"), at(1))
    save(folder, at(2), "f", limit=1)
    assert names(folder) == ["step-00000002", "step-00000009.bak", "step-best"]
