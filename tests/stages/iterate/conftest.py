"""Rounds that several modules read."""

from pathlib import Path

import pytest

from prefpipe.runs.store import Manifest
from prefpipe.stages.iterate import stage
from tests.stages.iterate import cases
from tests.stages.iterate.cases import Make


@pytest.fixture(scope="session")
def make(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A config with the fake engine; tables in its arguments are added to those of `cases.settings`."""
    prompts = cases.write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")
    return lambda **changes: cases.config(tiny_model, prompts, **changes)


@pytest.fixture(scope="session")
def three(make: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """Three rounds without a pause."""
    out = tmp_path_factory.mktemp("three") / "out"
    return out, stage.run(make(rounds=3), out, force=False, runner=cases.in_process)
