"""Damage or lose any one file of a complete run, run the command again: it is whole again, and nothing was deleted."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.config.generate import GenerateConfig
from prefpipe.config.train import TrainConfig
from prefpipe.runs import store
from prefpipe.runs.store import Manifest
from prefpipe.stages import build_pairs
from prefpipe.stages.generate import stage as generate
from prefpipe.stages.train import stage

NAMES = {
    "generate": [
        *("dropped.parquet", "prompts/part-00001.parquet", "manifest.json"),
        *("completions/part-00002.parquet", "rewards/short_sentence/part-00001.parquet"),
        "dropped/part-00000.parquet",
    ],
    "build-pairs": ["dropped.parquet", "pairs/part-00000.parquet", "data_report.json", "manifest.json"],
    "train": [
        *(
            "dropped.parquet",
            "ref_logps/part-00000.parquet",
            "margins/part-00000.parquet",
            "metrics.jsonl",
            "manifest.json",
        ),
        *("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/prefpipe.json"),
    ],
}
CASES = [(command, name) for command, names in NAMES.items() for name in names]
Rerun = Callable[[Path], Manifest]


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Rerun]]:
    """A complete run of each command, and how to run it (again) in a directory."""
    folder = tmp_path_factory.mktemp("runs")
    prompts = Path(__file__).resolve().parents[2] / "data" / "prompts.jsonl"
    sampling = GenerateConfig(
        model=str(tiny_model), prompts=str(prompts), engine="fake", num_samples=3, rewards=("short_sentence",),
        shard_rows=1, limit=3, reference="none",
    )  # fmt: skip
    pairing = BuildPairsConfig(completions=(str(folder / "generate"),), reward="short_sentence")
    training = TrainConfig(
        model=str(tiny_model), pairs=(str(folder / "build-pairs"),), dtype="float32", train_batch_size=1, lora_r=2
    )  # without reference log-probs in the pairs, train makes its own
    reruns: dict[str, Rerun] = {
        "generate": lambda out: generate.run(sampling, out, force=False),
        "build-pairs": lambda out: build_pairs.run(pairing, out, force=False),
        "train": lambda out: stage.run(training, out, force=False),
    }
    for command, rerun in reruns.items():
        rerun(folder / command)
    return {command: (folder / command, rerun) for command, rerun in reruns.items()}


def test_every_file_of_the_manifests_is_a_case(runs: dict[str, tuple[Path, Rerun]]) -> None:
    for command, (complete, _) in runs.items():
        kinds = {n.replace("00000", "N").replace("00001", "N").replace("00002", "N") for n in NAMES[command]}
        files = {n.replace("00000", "N").replace("00001", "N").replace("00002", "N")
                 for n in store.read_manifest(complete)["files"]}  # fmt: skip
        assert files - {"adapter/README.md"} == kinds - {"manifest.json"}


@pytest.mark.parametrize(("command", "name"), CASES)
def test_a_damaged_file_is_made_again(
    runs: dict[str, tuple[Path, Rerun]], tmp_path: Path, command: str, name: str
) -> None:
    complete, rerun = runs[command]
    shutil.copytree(complete, tmp_path / "out")
    damaged = bytearray((tmp_path / "out" / name).read_bytes())
    damaged[len(damaged) // 2] ^= 128
    (tmp_path / "out" / name).write_bytes(damaged)
    manifest = rerun(tmp_path / "out")
    assert manifest["digest"] == store.read_manifest(complete)["digest"]
    assert (tmp_path / "out" / name).read_bytes() == (complete / name).read_bytes()
    assert bytes(damaged) in [p.read_bytes() for p in (tmp_path / "out" / "quarantine").rglob("*") if p.is_file()]
    assert rerun(tmp_path / "out") == manifest


@pytest.mark.parametrize(("command", "name"), CASES)
def test_a_lost_file_is_made_again(
    runs: dict[str, tuple[Path, Rerun]], tmp_path: Path, command: str, name: str
) -> None:
    complete, rerun = runs[command]
    shutil.copytree(complete, tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    manifest = rerun(tmp_path / "out")
    assert manifest["digest"] == store.read_manifest(complete)["digest"]
    assert (tmp_path / "out" / name).read_bytes() == (complete / name).read_bytes()
