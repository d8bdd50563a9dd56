"""Pairs of twenty prompts with the tiny model's log-probs; sweeps promise equal bits at equal thread count."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.stages.train import data


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pairs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = data.with_reference(data.bare_pairs(20, num_prompts=10), tiny_model)
    return data.write_pairs(tmp_path_factory.mktemp("pairs") / "p", rows)
