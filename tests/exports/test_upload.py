"""Which files of a run leave it, and which runs do not."""

import json
import shutil
from pathlib import Path

import pytest

from prefpipe.errors import DataError, MissingInputError, UsageError
from prefpipe.exports import upload
from prefpipe.models import fingerprint
from prefpipe.runs import store
from tests.stages.build_pairs.runs import REWARD

BASE = "org/base"


def test_an_adapter_with_its_card_under_the_name_of_its_base(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    packed = upload.pack(trained, BASE)
    assert packed.kind == "model"
    assert {file.name for file in packed.files} == {p.name for p in (trained / "adapter").iterdir()}
    for file in packed.files:  # what arrives is an adapter that prefpipe takes as the same one
        (tmp_path / file.name).write_bytes(file.path.read_bytes() if file.text is None else file.text.encode())
        assert file.size == (tmp_path / file.name).stat().st_size
        assert str(tiny_model).encode() not in (tmp_path / file.name).read_bytes()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE
    assert f"base_model: {BASE}\n" in (tmp_path / "README.md").read_text()
    assert f'from_pretrained("{BASE}")' in (tmp_path / "README.md").read_text()
    assert fingerprint.adapter_digest(tmp_path) == fingerprint.adapter_digest(trained / "adapter")


def test_the_folder_and_the_best_round_are_the_same(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "best").symlink_to(trained / "adapter")
    expected = [file.name for file in upload.pack(trained, BASE).files]
    for place in (trained / "adapter", tmp_path):
        assert [file.name for file in upload.pack(place, BASE).files] == expected
    (tmp_path / "c" / "merged").mkdir(parents=True)
    for name in ("config.json", "manifest.json"):
        shutil.copyfile(trained / name, tmp_path / "c" / name)
    with pytest.raises(UsageError, match="has no merged/"):
        upload.pack(tmp_path / "c" / "merged", BASE)


def test_a_base_on_this_machine_needs_a_name(trained: Path, tiny_model: Path) -> None:
    with pytest.raises(UsageError, match="by a place on this machine") as error:
        upload.pack(trained)
    assert "--base-model" in error.value.hint
    with pytest.raises(UsageError, match="no name of the hub"):
        upload.pack(trained, str(tiny_model))


def test_pairs_with_a_card_and_without_what_was_dropped(paired: Path) -> None:
    packed = upload.pack(paired)
    assert packed.kind == "dataset"
    assert [file.name for file in packed.files] == ["README.md", "data_report.json", "pairs/part-00000.parquet"]
    card = packed.files[0].text or ""
    assert "- config_name: pairs\n  data_files: pairs/*.parquet\n" in card
    assert f"2 pairs from 4 completions of 2 prompts.\n\n- reward: `{REWARD}`; rule: best-random-worse\n" in card
    assert "- `weights:a`\n" in card
    assert "| pairs | 2 | 2 | none |" in card
    assert "| D1 reward gap | OK |" in card


def test_incomplete_damaged_and_other_runs_stay_here(trained: Path, paired: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "t")
    weights = copy / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(DataError, match="damaged"):
        upload.pack(copy, BASE)
    (copy / "manifest.json").unlink()
    with pytest.raises(MissingInputError, match="no complete run"):
        upload.pack(copy, BASE)
    rows = shutil.copytree(paired, tmp_path / "p")
    (rows / "pairs" / "part-00000.parquet").unlink()
    with pytest.raises(DataError, match="damaged or missing"):
        upload.pack(rows)
    with pytest.raises(UsageError, match="holds no policy"):
        upload.pack(paired, BASE)
    with pytest.raises(UsageError, match="is a run of generate"):
        upload.pack(paired.parent / "g")


def test_a_card_with_a_place_stays_here(trained: Path, paired: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(paired, tmp_path / "p")
    settings = json.loads((copy / "config.json").read_text())
    settings["config"]["reward"] = "/srv/rewards/mine.py:f"
    (copy / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match=r"README.md shows a place on this machine: /srv/rewards/"):
        upload.pack(copy)
    assert store.read_manifest(copy) == store.read_manifest(paired)
