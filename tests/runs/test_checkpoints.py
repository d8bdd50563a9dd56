"""Checkpoints of train as other runs take them: their records, and whether their files are there."""

import json
from pathlib import Path
from typing import Any

import pytest

from prefpipe.errors import DataError, IdentityError
from prefpipe.runs import checkpoints, manifests
from prefpipe.runs.checkpoints import Source
from prefpipe.runs.store import Manifest


@pytest.fixture
def found(tmp_path: Path) -> Source:
    manifest: Manifest = {"command": "train"}  # pyright: ignore[reportAssignmentType]  (nothing else of it is read)
    return Source(tmp_path, manifest, "rmsprop", 8)


def write(path: Path, **values: Any) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "state.json").write_text(json.dumps(manifests.sealed({"step": 8, **values})))


def test_files_that_are_there_are_enough_whatever_they_hold(found: Source):
    place = found.checkpoint
    assert place.name == "step-00000008"
    names = ["state-00001-of-00002.safetensors", "state-00002-of-00002.safetensors"]
    write(place, files=dict.fromkeys(names, "0" * 64))
    for name in names:
        with pytest.raises(DataError, match="its checkpoint 8 is damaged or missing"):
            checkpoints.check_there(found)
        (place / name).touch()
    checkpoints.check_there(found)


def test_a_checkpoint_of_an_older_version_has_one_file(found: Source):
    write(found.checkpoint, blake3="0" * 64)
    described = checkpoints.record(found.checkpoint)
    assert described is not None
    assert checkpoints.files(described) == {"state.safetensors": "0" * 64}


@pytest.mark.parametrize("name", ["../state.safetensors", "state.bin", "state-1-of-2.safetensors/x"])
def test_a_record_that_names_other_files_is_none(found: Source, name: str):
    write(found.checkpoint, files={name: "0" * 64})
    assert checkpoints.record(found.checkpoint) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 1}'])
def test_a_record_that_is_damaged_is_none(found: Source, text: str):
    assert checkpoints.record(found.checkpoint) is None
    write(found.checkpoint)
    (found.checkpoint / "state.json").write_text(text)
    assert checkpoints.record(found.checkpoint) is None


def test_a_run_with_another_kind_of_optimizer_is_refused(found: Source):
    checkpoints.check_kind(found, "rmsprop")
    with pytest.raises(IdentityError, match="optim = rmsprop, whose state is not that of lion"):
        checkpoints.check_kind(found, "lion")
