"""Nothing is unpickled, no code of a model or a dataset runs, nothing leaves its directory, no secret is written."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from prefpipe.errors import DataError
from prefpipe.runs import manifests, store
from prefpipe.stages.train import stage
from tests.forge import Forge
from tests.stages.train import data

CODE = "from pathlib import Path\nPath({marker!r}).write_text('ran')\n"
SECRET = "hf_" + "S3cr3tS3cr3t" * 3


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return data.write_pairs(tmp_path / "p", data.bare_pairs(8))


def test_a_whole_run_and_its_resume_unpickle_and_pickle_nothing(
    tiny_model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """torch.load, torch.save and pickle raise; a checkpoint is resumed from, and no file looks like a pickle."""

    def forbidden(*_given: Any, **_named: Any) -> None:
        raise AssertionError("a pickle")

    for owner, name in ((torch, "load"), (torch, "save"), (pickle, "load"), (pickle, "Unpickler"), (pickle, "dump")):
        monkeypatch.setattr(owner, name, forbidden)
    config = data.config(tiny_model, pairs, merge=True, eval_split=0.25, load_best_model_at_end=True)
    stage.run(config, tmp_path / "t", force=False)
    for name in ("adapter", "merged"):
        shutil.rmtree(tmp_path / "t" / name)
    (tmp_path / "t" / "manifest.json").unlink()
    stage.run(config, tmp_path / "t", force=False)  # from the last checkpoint
    files = [p for p in (tmp_path / "t").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".json", ".jsonl", ".safetensors", ".parquet", ".md", ".jinja", ""}
    for path in files:
        assert path.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), path


def test_code_that_comes_with_a_model_does_not_run(forged: Forge, tiny_model: Path, pairs: Path, tmp_path: Path):
    """A model whose config names its own Python files: refused, and the files were not imported."""
    shutil.copytree(tiny_model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "evil.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    done = forged.run("train", "--model", tmp_path / "m", "--pairs", pairs, "--out", tmp_path / "t")
    assert done.code != 0
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "t" / "manifest.json").exists()


def test_text_of_a_dataset_is_never_executed(forged: Forge, tiny_model: Path, tmp_path: Path):
    """Templates and code in prompts and completions are text."""
    marker = tmp_path / "ran"
    text = "{{ ''.__class__.__mro__ }} {% set x = 1 %} __import__('os').system('touch " + str(marker) + "')"
    rows = [{"prompt": f"{text} {n}", "chosen": text, "rejected": "$(touch " + str(marker) + ")"} for n in range(3)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = forged.run(
        "train", "--model", tiny_model, "--pairs", tmp_path / "p.jsonl", "--dtype", "float32", "--out", tmp_path / "t"
    )
    assert done.code == 0, done.stderr
    assert store.read_manifest(tmp_path / "t")["totals"]["pairs"] == 3
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "adapter/../../x", "a\x00b"])
def test_a_manifest_cannot_name_files_outside_of_its_directory(
    tiny_model: Path, pairs: Path, tmp_path: Path, name: str
):
    """Of an input it is an error; of our own run the manifest is made again, and the outside is left alone."""
    (tmp_path / "secret.safetensors").write_bytes(b"outside")
    manifest = json.loads((pairs / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 7, "blake3": "0" * 32}
    manifest["digest"] = manifests.digest(manifest)
    (pairs / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="names files outside its directory"):
        stage.run(data.config(tiny_model, pairs), tmp_path / "t", force=False)
    assert (tmp_path / "secret.safetensors").read_bytes() == b"outside"


def test_secrets_of_the_environment_reach_no_file_and_no_log(
    forged: Forge, tiny_model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Tokens that other libraries read from the environment."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    done = forged.run("train", "--model", tiny_model, "--pairs", pairs, "--dtype", "float32", "--out", tmp_path / "t")
    assert done.code == 0, done.stderr
    assert SECRET not in done.stderr
    for path in (tmp_path / "t").rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
