"""Cutting the prompts of a file: into parts for several processes, and into shards that are committed one by one."""

import math
from collections.abc import Mapping
from typing import Any

from prefpipe.errors import UsageError
from prefpipe.inputs.prompts import Prompts

_SHARDS, _FEWEST_ROWS, _MOST_ROWS = 64, 16, 512


def take_part(prompts: Prompts, part: str) -> Prompts:
    """The prompts of part I/N. Raises UsageError for a part that does not exist."""
    return prompts.part(*part_of(part))


def part_of(part: str) -> tuple[int, int]:
    """The numbers (I, N) of a part I/N. Raises UsageError for a part that does not exist."""
    number, count = map(int, part.split("/"))
    if number > count:
        raise UsageError(f"part = '{part}': there are only {count} parts", "write I/N with I from 1 to N")
    return number, count


def shards_of(prompts: Prompts, saved: Mapping[str, Any]) -> tuple[int, range]:
    """The number of places in a shard, and the numbers of the shards, from the saved settings of a run. Runs of older
    versions have saved no size."""
    rows = saved["shard_rows"] or fitting_rows(len(prompts))
    return rows, range(math.ceil(prompts.num_places / rows))


def fitting_rows(num_prompts: int) -> int:
    """The number of prompts in a shard: enough that commits cost nothing, few enough that a killed run loses little."""
    return min(_MOST_ROWS, max(_FEWEST_ROWS, math.ceil(num_prompts / _SHARDS)))
