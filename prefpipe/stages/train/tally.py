"""The metrics of a step: values of its rows, gathered over micro-batches and ranks, as means and quantiles.

The values of the rows are kept one by one until the step ends: a mean of rounded partial sums would depend on how the
step was cut, and a quantile needs all of them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from prefpipe.stages.train.examples import TrainRow
from prefpipe.stages.train.parallel import World

Key = tuple[str, int]  # of a row: its id, and the number of its source
QUANTILES = {"p05": 0.05, "p50": 0.50, "p95": 0.95}
_MARGINS = "rewards/margins"
_WITH_QUANTILES = ("rewards/chosen", "rewards/rejected", _MARGINS)


@dataclass(frozen=True)
class Summary:
    """The metrics of a step by name, and the margin of each of its pairs (or groups) where there is a reference."""

    values: dict[str, float]
    margins: Mapping[Key, float]


@dataclass
class Tally:
    """By name, totals over the step and values of the rows that count, and the keys of all rows; they grow with every
    micro-batch."""

    totals: dict[str, float] = field(default_factory=dict[str, float])
    rows: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    keys: list[Key] = field(default_factory=list[Key])

    def add_total(self, name: str, value: float) -> None:
        """Add to what is summed over the step, such as the loss and token counts."""
        self.totals[name] = self.totals.get(name, 0.0) + value

    def add_rows(self, metrics: Mapping[str, tuple[torch.Tensor, torch.Tensor]], of: Sequence[TrainRow]) -> None:
        """Add name -> (values [B], which of them count [B]) of rows [B], in one transfer from the device."""
        if not metrics:
            return
        self.keys += map(key_of, of)
        values, counted = (torch.stack([pair[i].float() for pair in metrics.values()]).tolist() for i in (0, 1))
        for name, of_rows, counts in zip(metrics, values, counted, strict=True):
            kept = [value for value, count in zip(of_rows, counts, strict=True) if count]
            self.rows.setdefault(name, []).extend(kept)


def by_number(margins: Mapping[Key, float], keys: Iterable[Key], numbers: Iterable[int]) -> dict[int, float]:
    """The margins of rows with these keys and numbers, by their numbers."""
    numbered = zip(keys, numbers, strict=False) if margins else ()
    return {number: margins[key] for key, number in numbered if key in margins}


def key_of(row: TrainRow) -> Key:
    """The key of a row among all rows of a run."""
    return row.row_id, row.source


def summarise(tally: Tally, world: World) -> Summary:
    """Totals, means over the rows that count, and quantiles of the rewards; a name without rows is left out. A
    collective call: all ranks get the same."""
    gathered = world.gather((tally.totals, tally.rows, tally.keys))
    totals: dict[str, float] = {}
    rows: dict[str, list[float]] = {}
    margins: dict[Key, float] = {}
    for totals_of_rank, rows_of_rank, keys in gathered:
        margins |= zip(keys, rows_of_rank.get(_MARGINS, ()), strict=False)  # rewards without a reference have none
        for name, value in totals_of_rank.items():
            totals[name] = totals.get(name, 0.0) + value
        for name, values in rows_of_rank.items():
            rows.setdefault(name, []).extend(values)
    metrics = dict(totals)
    for name, values in rows.items():
        if values:
            metrics[name] = _mean(values)
        if values and name in _WITH_QUANTILES:
            metrics |= {f"{name}/{label}": quantile(values, share) for label, share in QUANTILES.items()}
    return Summary(metrics, margins)


def quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics, as numpy's default; NaN when a value is NaN."""
    if any(map(math.isnan, values)):
        return math.nan
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    if ordered[low] == ordered[high]:
        return ordered[low]
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _mean(values: Sequence[float]) -> float:
    """The mean, exactly rounded, so that the order of the rows does not matter; not finite when a value is not."""
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else sum(values) / len(values)
