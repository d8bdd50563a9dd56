"""Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943, with a factor of 2): at which step a variant
pauses, and which variants go on. Pure.

A variant pauses at an evaluation that its run makes anyway, with a checkpoint, and continues from there. Its files are
those of `train` without a pause, to the byte. Halving costs only the steps of the variants that stop.
"""

import math
from collections.abc import Mapping, Sequence

from prefpipe.errors import UsageError


def pauses(shares: Sequence[float], num_steps: int, eval_steps: int) -> list[int]:
    """For each share of the steps of a run, the step of the next evaluation, at most the last step."""
    return [min(num_steps, eval_steps * math.ceil(share * num_steps / eval_steps)) for share in shares]


def check(shares: Sequence[float], num_steps: int, eval_steps: int) -> None:
    """Raise UsageError where a pause of a run of this many steps would be its end, or equal the pause before."""
    steps = [*pauses(shares, num_steps, eval_steps), num_steps]
    if len(set(steps)) < len(steps):
        raise UsageError(
            f"halving = {', '.join(map(str, shares))} of {num_steps} steps, evaluated every {eval_steps}, compares "
            f"after steps {', '.join(map(str, steps[:-1]))}",
            "lower eval_steps, or give fewer shares",
        )


def better_half(values: Mapping[str, float | None]) -> list[str]:
    """The names with the highest values, half of them rounded up, in the order of `values`; of equal values the first.
    A variant without a value has failed, and does not go on."""
    known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
    best = sorted(known, key=lambda name: -known[name])[: math.ceil(len(values) / 2)]
    return [name for name in values if name in best]
