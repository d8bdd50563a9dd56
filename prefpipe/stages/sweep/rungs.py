"""Successive halving: after which step a variant pauses, and which variants go on (Jamieson and Talwalkar 2016,
arXiv:1502.07943, with a factor of 2). Pure.

A variant pauses at an evaluation that it makes anyway, with a checkpoint, and goes on from there: its run is that of
`train` without a pause, to the byte. Halving costs nothing beside the steps of the variants that stop.
"""

import math
from collections.abc import Mapping, Sequence

from prefpipe.errors import UsageError


def pauses(shares: Sequence[float], num_steps: int, eval_steps: int) -> list[int]:
    """For every share of the steps of a run the step of its next evaluation; that of the last one is the end."""
    return [min(num_steps, eval_steps * math.ceil(share * num_steps / eval_steps)) for share in shares]


def check(shares: Sequence[float], num_steps: int, eval_steps: int) -> None:
    """Raise UsageError where a rung of a run of so many steps is its end, or that of the rung before."""
    steps = [*pauses(shares, num_steps, eval_steps), num_steps]
    if len(set(steps)) < len(steps):
        raise UsageError(
            f"halving = {', '.join(map(str, shares))} of {num_steps} steps, evaluated every {eval_steps}, compares "
            f"after steps {', '.join(map(str, steps[:-1]))}",
            "lower eval_steps, or give fewer shares",
        )


def better_half(values: Mapping[str, float | None]) -> list[str]:
    """The names with the highest values, half of them and rounded up, in the order in which they stand; of equal ones
    the earlier. A variant without a value (it failed) does not go on."""
    known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
    best = sorted(known, key=lambda name: -known[name])[: math.ceil(len(values) / 2)]
    return [name for name in values if name in best]
