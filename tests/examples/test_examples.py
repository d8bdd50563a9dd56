"""Every script of examples/ runs as it stands, on the tiny model and a small file."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from prefpipe.models import policy
from prefpipe.runs import store
from tests.conftest import ROOT

SCRIPTS = sorted(p.name for p in (ROOT / "examples").glob("*.sh"))
FLAGS = ("--dtype", "float32", "--lora-r", "2", "--learning-rate", "1e-3")
Run = Callable[..., str]


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path, prefpipe: str) -> Run:
    """Run a script with `prefpipe`, `python` and `torchrun` of this environment; gives what it printed.

    `real` starts a process for every `prefpipe`, as signals need it.
    """
    (tmp_path / "bin").mkdir()
    for name, command in (
        ("prefpipe", "-m prefpipe"), ("python", ""), ("torchrun", "-m torch.distributed.run"),
    ):  # fmt: skip
        file = tmp_path / "bin" / name
        file.write_text(f'#!/bin/sh\nexec {sys.executable} {command} "$@"\n')
        file.chmod(0o755)
    (tmp_path / "fast").mkdir()
    (tmp_path / "fast" / "prefpipe").write_text(prefpipe)
    (tmp_path / "fast" / "prefpipe").chmod(0o755)
    rows = [{"prompt": f"Bird {n}?", "chosen": f"Owl {n}.", "rejected": f"I say no, {n}."} for n in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def script(name: str, *flags: str, real: bool = False, **variables: str) -> str:
        first = tmp_path / ("bin" if real else "fast")
        env = {
            **os.environ, "PATH": f"{first}:{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1", "MODEL": str(tiny_model), "OUT": str(tmp_path / "out"),
            "PAIRS": str(tmp_path / "pairs.jsonl"), **variables,
        }  # fmt: skip
        done = subprocess.run(
            ["bash", ROOT / "examples" / name, *flags], cwd=ROOT, env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return script


def test_every_script_has_a_test_and_says_how_to_run_it():
    tests = Path(__file__).read_text()
    for name in SCRIPTS:
        assert f'run("{name}"' in tests, name
        assert f"# Run: examples/{name}" in (ROOT / "examples" / name).read_text()
        assert os.access(ROOT / "examples" / name, os.X_OK)


def test_a_trl_file_alone(run: Run, tmp_path: Path):
    run("trl_file.sh", *FLAGS)
    totals = store.read_manifest(tmp_path / "out" / "trl_file")["totals"]
    assert (totals["pairs"], totals["eval_pairs"], totals["steps"]) == (11, 1, 2)
    assert totals["audit"]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_pairs_of_our_own_run(run: Run, tmp_path: Path):
    run("own_pairs.sh", *FLAGS, ENGINE="transformers", LIMIT="4", TRUNCATED_CHOSEN="keep", CHECK="0")
    manifest = store.read_manifest(tmp_path / "out" / "own_pairs")
    assert manifest["inputs"]["pairs.0"] == store.read_manifest(tmp_path / "out" / "pairs")["digest"]
    assert not (tmp_path / "out" / "own_pairs" / "ref_logps").exists()  # the cache of `generate` was used


def test_two_loss_terms(run: Run, tmp_path: Path):
    run("two_losses.sh", *FLAGS)
    first = json.loads((tmp_path / "out" / "two_losses" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] > 0.6931 + 0.5  # DPO at ln 2, and half of an NLL of several nats


def test_full_fine_tuning(run: Run, tmp_path: Path, tiny_model: Path):
    assert "answer:" in run("full_finetuning.sh", "--dtype", "float32")
    manifest = store.read_manifest(tmp_path / "out" / "full_finetuning")
    assert manifest["identity"]["policy"] == policy.resolve(str(tmp_path / "out" / "full_finetuning" / "model")).id


def test_continue_from_an_adapter(run: Run, tmp_path: Path, tiny_model: Path):
    run("continue_adapter.sh", *FLAGS)
    first = policy.resolve(str(tiny_model), str(tmp_path / "out" / "first" / "adapter")).id
    identity = store.read_manifest(tmp_path / "out" / "second")["identity"]
    assert identity["initial"] == identity["reference"] == first != identity["policy"]
    assert (tmp_path / "out" / "second" / "merged" / "model.safetensors").is_file()


def test_stop_and_resume(run: Run, tmp_path: Path):
    said = run("resume.sh", *FLAGS, "--train-batch-size", "1", "--num-train-epochs", "12", real=True, AFTER="9")
    assert "trained on 12 pairs in 144 steps" in said
    if "stopping after this step" in said:
        assert "stopped: go on with the same command" in said
        assert "resuming after step" in said


def test_two_processes(run: Run, tmp_path: Path):
    assert run("torchrun.sh", *FLAGS, "--max-tokens-per-micro-batch", "64").count("trained on 12 pairs") == 1
    assert store.read_manifest(tmp_path / "out" / "torchrun")["totals"]["steps"] == 2
