"""Training tests promise equal bits, which hold at equal thread count."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from prefpipe.schemas import Pair
from tests.stages.train import data


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def rows(tiny_model: Path) -> list[Pair]:
    """Ten pairs with the tiny model's own log-probs."""
    return data.with_reference(data.bare_pairs(10), tiny_model)


@pytest.fixture(scope="module")
def pairs(rows: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of build-pairs that holds them."""
    return data.write_pairs(tmp_path_factory.mktemp("pairs") / "p", rows)
