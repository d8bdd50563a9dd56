"""The notebook runs from top to bottom, and its runs are those of the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import prefpipe
from tests.conftest import ROOT, Call

NOTEBOOK = ROOT / "examples" / "notebook.ipynb"
BRIEF = '{"brief": {"kind": "length", "unit": "characters", "max": 10}}'


def ended(runs: Path, model: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MODEL": str(model), "RUNS": str(runs), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "tests.examples.notebook", NOTEBOOK], capture_output=True, text=True, check=False,
        cwd=ROOT, env=environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of the notebook."""
    folder = tmp_path_factory.mktemp("notebook")
    done = ended(folder, tiny_model)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("<table") >= 4
    assert "loss __main__:one_sided: 0.6931 where the policy is the reference" in done.stderr
    return folder


def test_its_runs_are_those_of_the_command_line(runs: Path, tiny_model: Path, tmp_path: Path, call: Call) -> None:
    commands = [
        ("generate", "--model", tiny_model, "--prompts", "data/prompts.jsonl", "--limit", 8, "--num-samples", 4,
         "--max-tokens", 24, "--engine", "transformers", "--check", 0, "--rewards", "brief",
         "--reward-settings", BRIEF),
        ("build-pairs", "--completions", tmp_path / "g", "--reward", "brief", "--gap-filter", "none",
         "--truncated-chosen", "keep"),
        ("train", "--model", tiny_model, "--pairs", tmp_path / "p", "--learning-rate", 1e-4, "--train-batch-size", 4,
         "--lora-r", 4),
    ]  # fmt: skip
    for command, name in zip(commands, ("g", "p", "t"), strict=True):
        done = call(*command, "--out", tmp_path / name)
        assert done.code == 0, done.stderr
        assert prefpipe.load(tmp_path / name).digest == prefpipe.load(runs / name).digest, name


def test_it_resumes_and_its_own_loss_is_known_again(runs: Path, tiny_model: Path) -> None:
    before = prefpipe.load(runs / "own").digest
    again = ended(runs, tiny_model)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("is complete already") == 4
    assert prefpipe.load(runs / "own").digest == before
    assert list(prefpipe.load(runs / "own").config["loss_type"]) == ["__main__:one_sided"]


def test_it_holds_no_results() -> None:
    cells = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    assert [c for c in cells if c["outputs"] or c["execution_count"] is not None] == []
