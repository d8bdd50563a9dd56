"""How many prompts a shard of the gathered run has. That its rows are in order is tested through the command line."""

from pathlib import Path

import pytest

from prefpipe.inputs.prompts import Prompts
from prefpipe.stages.gather.parts import Part
from prefpipe.stages.gather.rows import shard_size


@pytest.mark.parametrize(
    ("prompts", "told", "size"),
    [
        (4000, (32, 32), 63),  # each took what fits its 2,000 prompts
        (4001, (32, 32), 63),  # 2,001 and 2,000 prompts
        (2049, (17, 16), 33),  # 1,025 and 1,024 prompts, which another number fits each
        (4000, (100, 100), 100),  # both were told
        (4000, (100, 200), 63),  # told two numbers
    ],
)
def test_a_shard_has_the_size_of_one_run(prompts: int, told: tuple[int, int], size: int) -> None:
    parts = [Part(Path(), i, 2, {}, {"config": {"shard_rows": rows}}) for i, rows in enumerate(told, 1)]
    assert shard_size(parts, Prompts("p.jsonl", bytes([1]) * prompts)) == size
