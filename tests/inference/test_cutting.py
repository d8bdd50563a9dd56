"""Prompts are cut into parts and shards by numbers that do not depend on the machine."""

import pytest

from prefpipe.errors import UsageError
from prefpipe.inference import cutting


@pytest.mark.parametrize(
    ("prompts", "rows"), [(1, 16), (16, 16), (1024, 16), (1025, 17), (10_000, 157), (1_000_000, 512)]
)
def test_a_shard_is_neither_small_nor_large(prompts: int, rows: int) -> None:
    assert cutting.fitting_rows(prompts) == rows


def test_a_part_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="there are only 2 parts"):
        cutting.part_of("3/2")
