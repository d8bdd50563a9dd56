"""An adapter that is merged after its training: the bytes of `train --merge`, and refusals."""

import json
import shutil
from pathlib import Path

import pytest

from prefpipe.errors import DataError, IdentityError, UsageError
from prefpipe.models.policy import resolve
from prefpipe.runs import store
from prefpipe.stages.train import merging, stage
from tests.cases import assert_refused
from tests.conftest import Cli
from tests.stages.train import data

pytestmark = pytest.mark.slow


@pytest.fixture
def pairs(trained: Path) -> Path:
    """What the run was trained on."""
    return trained.parent / "p"


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to damage."""
    return shutil.copytree(trained, tmp_path / "t")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_it_is_what_train_writes_with_merge(tiny_model: Path, pairs: Path, trained: Path, tmp_path: Path) -> None:
    identity = merging.run(trained, tmp_path / "m")
    stage.run(data.config(tiny_model, pairs, merge=True), tmp_path / "t", force=False)
    assert contents(tmp_path / "m") == contents(tmp_path / "t" / "merged")
    record = json.loads((tmp_path / "m" / "prefpipe.json").read_text())
    assert record["policy"] == identity == resolve(str(tmp_path / "m")).id
    base, _, adapter = store.read_manifest(trained)["identity"]["policy"].partition("+adapter:")
    assert record["merged_from"] == {"base": base, "adapter": adapter}
    assert identity != base


def test_again_it_is_complete_and_from_the_folder_or_the_best_link_the_same(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "rounds").mkdir()
    (tmp_path / "rounds" / "best").symlink_to(trained / "adapter")
    (tmp_path / "m").mkdir()
    identity = merging.run(trained / "adapter", tmp_path / "m")
    written = (tmp_path / "m" / "model.safetensors").stat().st_mtime_ns
    assert merging.run(tmp_path / "rounds", tmp_path / "m") == identity
    assert (tmp_path / "m" / "model.safetensors").stat().st_mtime_ns == written


def test_another_thing_in_out_stays(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        merging.run(trained, tmp_path / "m")
    assert contents(tmp_path / "m") == {"notes.txt": b"mine"}


def test_a_merged_model_that_was_damaged_is_refused(trained: Path, tmp_path: Path) -> None:
    merging.run(trained, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UsageError, match="is not this merged model"):
        merging.run(trained, tmp_path / "m")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "prefpipe.json"])
def test_a_damaged_adapter_is_refused(copied: Path, tmp_path: Path, name: str) -> None:
    file = copied / "adapter" / name
    content = file.read_bytes()
    file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    with pytest.raises(DataError, match="damaged"):
        merging.run(copied, tmp_path / "m")
    file.unlink()
    with pytest.raises(DataError, match="damaged or missing"):
        merging.run(copied, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_another_base_is_refused_and_the_same_one_elsewhere_taken(
    tiny_model: Path, other_model: Path, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(IdentityError, match="was trained on base"):
        merging.run(trained, tmp_path / "m", str(other_model))
    assert not (tmp_path / "m").exists()
    elsewhere = shutil.copytree(tiny_model, tmp_path / "elsewhere")
    assert merging.run(trained, tmp_path / "m", str(elsewhere)) == resolve(str(tmp_path / "m")).id


def test_runs_without_an_adapter_are_refused(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run of build-pairs"):
        merging.run(pairs, tmp_path / "m")
    full = data.config(tiny_model, pairs, tuning="full", lora_r=16, lora_alpha=32, learning_rate=1e-3)
    stage.run(full, tmp_path / "t", force=False)
    with pytest.raises(UsageError, match="every weight"):
        merging.run(tmp_path / "t", tmp_path / "m")


def test_train_with_merge_on_a_complete_run_names_the_command(cli: Cli, copied: Path, tmp_path: Path) -> None:
    before = contents(copied)
    done = cli("train", copied / "config.json", "--merge", "--out", copied)
    assert_refused(done, 2, "merge: False there, True now", f"`prefpipe merge {copied} --out DIR`")
    assert contents(copied).keys() - {".owner"} == before.keys() - {".owner"}
    merged = cli("merge", copied, "--out", tmp_path / "m")
    assert merged.returncode == 0, merged.stderr
    assert merged.stdout.splitlines() == [f"merged       {tmp_path / 'm'}", f"  {resolve(str(tmp_path / 'm')).id}"]
    assert_refused(cli("merge", tmp_path, "--out", tmp_path / "n"), 66, "no complete run")
