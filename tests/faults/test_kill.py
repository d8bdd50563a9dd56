"""Kill -9 at any write, fsync or rename, run the same command again: every byte is that of an uninterrupted run."""

import os
import random
import signal
from pathlib import Path

import pytest

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.config.generate import GenerateConfig
from prefpipe.stages import build_pairs
from prefpipe.stages.generate import stage as generate
from tests.conftest import ROOT
from tests.forge import Forge

POINTS = ("write", "fsync", "rename", "fsync_dir")
NUM_PROMPTS = 3  # one shard each
# config, then dropped, prompts, ref_logps, rewards, completions with a record each, then the ledger and its record, the
# parity report, the manifest
GENERATE_PASSES = 1 + NUM_PROMPTS * 5 * 2 + 2 + 1 + 1
PAIRS_PASSES = 1 + 2 + 2 + 1 + 1  # config, the one shard and its record, ledger and record, data report, manifest


def faults(passes: int) -> list[str]:
    """Every place where a run can be killed."""
    kills = [f"{point}:{n}:kill" for point in POINTS for n in range(1, passes + 1)]
    return [*kills, *(f"write:{n}:torn" for n in range(1, passes + 1)), "append:1:kill"]


def sampled(everything: list[str], count: int) -> list[str]:
    return random.Random(0).sample(everything, count)


def data_files(out: Path) -> dict[str, bytes]:
    """Every file but times, lock and its owner."""
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in sorted(out.rglob("*"))
        if p.is_file() and p.name not in (".lock", ".owner", "timing.jsonl")
    }


def kill(forged: Forge, command: str, saved: Path, out: Path, fault: str) -> None:
    done = forged.run(command, saved, "--out", out, fault=fault)
    assert done.code == -signal.SIGKILL, (fault, done.stderr)


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generate run (g) and a build-pairs run (p) that nothing disturbed, with their configs."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    prompts = ROOT / "data" / "prompts.jsonl"
    config = GenerateConfig(
        model=str(tiny_model), prompts=str(prompts), engine="fake", num_samples=3, rewards=("short_sentence",),
        shard_rows=1, limit=NUM_PROMPTS, reference="base",
    )  # fmt: skip
    (folder / "g.json").write_text(config.model_dump_json())
    generate.run(config, folder / "g", force=False)
    pairs = BuildPairsConfig(completions=(str(folder / "g"),), reward="short_sentence")
    (folder / "p.json").write_text(pairs.model_dump_json())
    build_pairs.run(pairs, folder / "p", force=False)
    return folder


def check_generate(forged: Forge, uninterrupted: Path, out: Path, fault: str) -> None:
    kill(forged, "generate", uninterrupted / "g.json", out, fault)
    config = GenerateConfig.model_validate_json((uninterrupted / "g.json").read_text())
    manifest = generate.run(config, out, force=False)
    assert data_files(out) == data_files(uninterrupted / "g")
    assert generate.run(config, out, force=False) == manifest


def check_pairs(forged: Forge, uninterrupted: Path, out: Path, fault: str) -> None:
    kill(forged, "build-pairs", uninterrupted / "p.json", out, fault)
    config = BuildPairsConfig.model_validate_json((uninterrupted / "p.json").read_text())
    build_pairs.run(config, out, force=False)
    assert data_files(out) == data_files(uninterrupted / "p")


@pytest.mark.parametrize("fault", sampled(faults(GENERATE_PASSES), 12))
def test_generate_killed_and_run_again(forged: Forge, uninterrupted: Path, tmp_path: Path, fault: str) -> None:
    check_generate(forged, uninterrupted, tmp_path / "g", fault)


@pytest.mark.parametrize("fault", sampled(faults(PAIRS_PASSES)[:-1], 4))
def test_build_pairs_killed_and_run_again(forged: Forge, uninterrupted: Path, tmp_path: Path, fault: str) -> None:
    check_pairs(forged, uninterrupted, tmp_path / "p", fault)


def test_the_sweep_reaches_the_end_of_a_run(forged: Forge, uninterrupted: Path, tmp_path: Path) -> None:
    fault = f"write:{GENERATE_PASSES + 1}:kill"
    assert forged.run("generate", uninterrupted / "g.json", "--out", tmp_path, fault=fault).code == 0


def test_killed_again_and_again(forged: Forge, uninterrupted: Path, tmp_path: Path) -> None:
    for number in (4, 6, 9):  # each start gets a little further
        kill(forged, "generate", uninterrupted / "g.json", tmp_path / "g", f"rename:{number}:kill")
    config = GenerateConfig.model_validate_json((uninterrupted / "g.json").read_text())
    generate.run(config, tmp_path / "g", force=False)
    assert data_files(tmp_path / "g") == data_files(uninterrupted / "g")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif("PREFPIPE_ALL_FAULTS" not in os.environ, reason="minutes: set PREFPIPE_ALL_FAULTS=1")
def test_every_place_of_both_commands(forged: Forge, uninterrupted: Path, tmp_path: Path) -> None:
    for fault in faults(GENERATE_PASSES):
        check_generate(forged, uninterrupted, tmp_path / f"g-{fault}", fault)
    for fault in faults(PAIRS_PASSES)[:-1]:
        check_pairs(forged, uninterrupted, tmp_path / f"p-{fault}", fault)
