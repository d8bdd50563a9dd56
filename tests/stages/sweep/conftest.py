"""Pairs of twenty prompts with the tiny model's log-probs; sweeps promise equal bits at equal thread count."""

from pathlib import Path

import pytest

from tests.stages.train import data
from tests.stages.train.conftest import one_thread as one_thread


@pytest.fixture(scope="module")
def pairs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = data.with_reference(data.bare_pairs(20, num_prompts=10), tiny_model)
    return data.write_pairs(tmp_path_factory.mktemp("pairs") / "p", rows)
