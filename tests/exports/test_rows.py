"""Runs of `build-pairs` as files for other trainers."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from prefpipe.errors import DataError, MissingInputError, UsageError
from prefpipe.exports import rows
from tests.cases import assert_refused
from tests.conftest import Cli
from tests.stages.build_pairs.runs import Row, build, pairs_of, run_of
from tests.stages.train.data import bare_pairs, write_pairs


def test_every_pair_in_order_with_what_the_trainer_wants_beside_them(cli: Cli, paired: Path, tmp_path: Path) -> None:
    done = cli("export", "llama-factory", paired, "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"exported     2 pairs to {tmp_path / 'o'}\n"
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"rows.jsonl", "dataset_info.json"}
    (info,) = json.loads((tmp_path / "o" / "dataset_info.json").read_text()).values()
    file = str(tmp_path / "o" / info["file_name"])
    found = datasets.load_dataset("json", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
    assert set(info["columns"].values()) == set(found.column_names)
    assert info["formatting"] == "sharegpt"
    assert info["ranking"] is True
    assert [r["chosen"]["value"] for r in found] == [p.chosen[0]["content"] for p in pairs_of(paired)]
    assert_refused(cli("export", "llama-factory", paired, "--out", tmp_path / "o"), 2, "is not empty")
    assert_refused(cli("export", "llama", paired, "--out", tmp_path / "n"), 2, "did you mean 'llama-factory'?")


def test_labels_where_the_trainer_has_kto(paired: Path, tmp_path: Path) -> None:
    some = [Row(p, f"{p}{n}", float(n), f"answer {n}") for p in ("a", "b") for n in range(2)]
    run = run_of(tmp_path / "g", some)
    build(tmp_path / "l", run, output="labels")
    assert rows.export("axolotl", tmp_path / "l", tmp_path / "a") == (4, "labels")
    written = [json.loads(line) for line in (tmp_path / "a" / "rows.jsonl").read_text().splitlines()]
    assert {(row["prompt"], row["label"]) for row in written} == {
        (f"about {p}", t) for p in "ab" for t in (True, False)
    }
    assert rows.export("llama-factory", tmp_path / "l", tmp_path / "f") == (4, "labels")
    (info,) = json.loads((tmp_path / "f" / "dataset_info.json").read_text()).values()
    assert info["columns"]["kto_tag"] == "kto_tag"
    assert "ranking" not in info
    with pytest.raises(UsageError, match="nemo-rl reads pairs"):
        rows.export("nemo-rl", tmp_path / "l", tmp_path / "n")
    build(tmp_path / "groups", run, output="groups")
    with pytest.raises(UsageError, match="has groups, and axolotl reads pairs or labels"):
        rows.export("axolotl", tmp_path / "groups", tmp_path / "n")
    with pytest.raises(MissingInputError):
        rows.export("axolotl", tmp_path, tmp_path / "n")


def test_a_row_without_a_shape_leaves_nothing(tmp_path: Path) -> None:
    some = bare_pairs(3)
    some[1] = replace(some[1], template_inputs='{"tools": [{"name": "f"}]}')
    run = write_pairs(tmp_path / "p", some)
    with pytest.raises(DataError, match=rf"1 of 3 pairs .* \(first: {some[1].pair_id}: NeMo RL takes no tools"):
        rows.export("nemo-rl", run, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_weights_and_soft_labels_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = bare_pairs(3)
    some[0], some[1] = replace(some[0], weight=2.0), replace(some[1], preference_prob=0.8)
    assert rows.export("nemo-rl", write_pairs(tmp_path / "p", some), tmp_path / "o") == (3, "pairs")
    assert "2 rows have a weight or a soft label, which nemo-rl does not read" in capsys.readouterr().err
