"""The policy of a run is found again, or refused with the reason."""

import shutil
from pathlib import Path

import pytest

from prefpipe.errors import DataError, IdentityError, UsageError
from prefpipe.stages.train import results, stage
from tests.stages.train import data

pytestmark = pytest.mark.slow


def test_an_adapter_and_a_whole_model(tiny_model: Path, other_model: Path, trained: Path, tmp_path: Path) -> None:
    found = results.find(trained)
    assert (found.run_dir, found.policy.adapter) == (trained, trained / "adapter")
    assert found.policy.id == found.manifest["identity"]["policy"]
    assert results.find(trained / "adapter").policy == found.policy
    with pytest.raises(IdentityError):
        results.find(trained, str(other_model))
    full = data.config(tiny_model, trained.parent / "p", tuning="full", lora_r=16, lora_alpha=32, learning_rate=1e-3)
    stage.run(full, tmp_path / "t", force=False)
    whole = results.find(tmp_path / "t")
    assert (whole.policy.directory, whole.policy.adapter) == (tmp_path / "t" / "model", None)
    weights = tmp_path / "t" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DataError, match="damaged"):
        results.find(tmp_path / "t")


def test_other_runs_and_other_bytes_are_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a run of build-pairs"):
        results.find(trained.parent / "p")
    copy = shutil.copytree(trained, tmp_path / "t")
    (copy / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(DataError, match="damaged or missing"):
        results.find(copy)
