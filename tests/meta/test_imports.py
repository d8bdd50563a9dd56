"""Heavy packages load only where they are used."""

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import prefpipe
from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.config.generate import GenerateConfig
from tests.conftest import ROOT

HEAVY = (
    *("torch", "vllm", "transformers", "peft", "polars", "pyarrow", "accelerate", "huggingface_hub", "tokenizers"),
    "ray",
)
TENSORS = ("torch", "vllm", "transformers", "peft", "accelerate", "safetensors")
# Imported by tests that run vllm and ray, alone.
OPTIONAL = ("prefpipe.engines.vllm", "prefpipe.inference.pool_ray", "prefpipe.inference.ray_tasks")
LIST = """
import sys
from prefpipe.cli import main
try:
    main()
finally:
    print("loaded:", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def loaded(*arguments: str) -> set[str]:
    """The packages that a command line loads."""
    done = subprocess.run(
        [sys.executable, "-c", LIST, *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    assert last.startswith("loaded: ")
    return set(last.split()[1:])


@pytest.mark.parametrize(
    "arguments", [("--help",), ("--version",), ("config", "train"), ("train", "--help"), ("iterate", "--dry-run")]
)
def test_light_commands_load_no_heavy_package(arguments: tuple[str, ...]) -> None:
    assert not loaded(*arguments) & set(HEAVY)


def test_sampling_loads_no_other_engine_and_building_pairs_no_tensors(tiny_model: Path, tmp_path: Path) -> None:
    """A model's tokenizer is that of transformers, which brings torch; rows that have token ids need neither."""
    sampling = GenerateConfig(
        model=str(tiny_model), prompts=str(ROOT / "data" / "prompts.jsonl"), engine="fake", limit=2,
        rewards=("short_sentence",),
    )  # fmt: skip
    (tmp_path / "g.json").write_text(sampling.model_dump_json())
    assert not loaded("generate", str(tmp_path / "g.json"), "--out", str(tmp_path / "g")) & {"vllm", "peft"}
    pairs = BuildPairsConfig(completions=(str(tmp_path / "g"),), reward="short_sentence")
    (tmp_path / "p.json").write_text(pairs.model_dump_json())
    found = loaded("build-pairs", str(tmp_path / "p.json"), "--out", str(tmp_path / "p"))
    assert not found & set(TENSORS)
    assert {"polars", "pyarrow"} <= found


def test_every_module_imports() -> None:
    modules = [m.name for m in pkgutil.walk_packages(prefpipe.__path__, "prefpipe.") if m.name not in OPTIONAL]
    assert len(modules) > 40
    for name in modules:
        assert importlib.import_module(name).__doc__, name
