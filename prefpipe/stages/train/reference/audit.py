"""Do the cached reference log-probs belong to the reference? Asked before step 0, answered by re-scoring rows.

The reference is the initial policy, its base, or a model that is named; the identities are compared first.

Thresholds (nats per token) come from measured noise: the signed mean catches a slightly trained model, which absolute
differences hide in bf16 noise; the absolute mean catches another model, template or mask.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from prefpipe.errors import DataError, IdentityError
from prefpipe.forward.layout import Tree
from prefpipe.stages.train.examples import TrainRow
from prefpipe.stages.train.micro_batches import tree_of

Score = Callable[[Sequence[Tree]], list[list[list[float]]]]
_NOISE = 0.055  # standard deviation per token between 16-bit kernels
_SIGNED, _ABSOLUTE_16, _ABSOLUTE_32, _EXACT_H = 0.01, 0.10, 0.001, 1e-3


@dataclass(frozen=True)
class Audit:
    """What re-scoring found: signed, absolute and root mean square difference per token (`deviation`), and the largest
    |h| of a row, in nats.

    h is the difference of log-ratios between the first and the last completion of a row; the log-ratio of a single one.
    """

    rows: int
    tokens: int
    signed_mean: float
    absolute_mean: float
    deviation: float
    largest_h: float
    loss: float

    def to_dict(self) -> dict[str, float]:
        """For the manifest."""
        return asdict(self)


def audit(rows: Sequence[TrainRow], count: int, score: Score, beta: float) -> Audit:
    """Re-score `count` rows spread over the data, always with the longest and the shortest, in one call of `score`."""
    chosen = _spread(rows, count)
    for row in chosen:
        check_cached(row)
    differences: list[float] = []
    gaps: list[float] = []
    for row, values in zip(chosen, score([tree_of(row) for row in chosen]), strict=True):
        deltas = [
            [now - then for now, then in zip(found, answer.reference or (), strict=True)]
            for found, answer in zip(values, row.answers, strict=True)
        ]
        differences += [d for own in deltas for d in own]
        gaps.append(sum(deltas[0]) - (sum(deltas[-1]) if len(deltas) > 1 else 0.0))
    tokens = len(differences)
    return Audit(
        rows=len(chosen),
        tokens=tokens,
        signed_mean=sum(differences) / tokens,
        absolute_mean=sum(map(abs, differences)) / tokens,
        deviation=math.hypot(*differences) / math.sqrt(tokens),
        largest_h=max(map(abs, gaps)) if all(map(math.isfinite, gaps)) else math.inf,
        loss=sum(_softplus(-beta * h) for h in gaps) / len(gaps),
    )


def check_cached(row: TrainRow) -> None:
    """Raise IdentityError when cached values are not one per token, DataError when one is not a finite number."""
    for answer in row.answers:
        values = answer.reference or ()
        if not all(map(math.isfinite, values)):
            raise DataError(
                f"row {row.row_id}: a cached log-prob of completion {answer.completion_id} is not a finite number",
                "make the values again with `prefpipe score`; a value is never replaced by a guess",
            )
        if answer.reference is not None and len(values) != len(answer.ids):
            raise IdentityError(
                f"row {row.row_id}: {len(values)} cached log-probs for {len(answer.ids)} tokens of completion "
                f"{answer.completion_id}",
                "the cache was edited or damaged: make the values again with `prefpipe score`",
            )


def _softplus(x: float) -> float:
    """log(1 + exp(x)) without overflow."""
    return max(0.0, x) + math.log1p(math.exp(-abs(x)))


def check(found: Audit, *, exact: bool, full_precision: bool) -> None:
    """Raise IdentityError when the cache does not belong to the model. `exact`: the same fp32 scorer on both sides."""
    signed_limit = max(_SIGNED, 4 * _NOISE / math.sqrt(found.tokens))
    absolute_limit = _ABSOLUTE_32 if full_precision else _ABSOLUTE_16
    # Written so that NaN fails.
    good = abs(found.signed_mean) <= signed_limit and found.absolute_mean <= absolute_limit
    if not good or (exact and not found.largest_h <= _EXACT_H):
        raise IdentityError(
            f"the cached reference log-probs do not belong to this model: re-scored on {found.rows} rows they differ "
            f"by {found.signed_mean:+.4f} per token on average (limit {signed_limit:.4f}) and "
            f"{found.absolute_mean:.4f} in absolute value (limit {absolute_limit}), up to {found.largest_h:.4f} nats "
            f"in one row; -log sigmoid(beta h) would be {found.loss:.4f} at step 0, not ln 2 = 0.6931",
            "make the values again with `prefpipe generate`, or pass the model, adapter and dtype that made them",
        )


def noise_between_kernels(deviation: float, *, full_precision: bool) -> float:
    """Nats by which the log-prob of a token may differ from its cached value when nothing is wrong, as a standard
    deviation: what the audit measured, and in 16 bits no less than between kernels, for a training step has other
    shapes than an audit."""
    return deviation if full_precision else max(deviation, _NOISE)


def check_scorers(scorers: Iterable[str], version: int) -> None:
    """Raise IdentityError for values of another version of this project's own forward pass. Other engines, dtypes and
    versions are judged by what re-scoring finds."""
    for name in sorted(scorers):
        found = re.match(r"forward-(\d+)/", name)
        if found and int(found[1]) != version:
            raise IdentityError(
                f"the cached reference log-probs were made by scorer {name}, this is forward-{version}",
                "make the values again: prefpipe score, whose output takes the place of these rows",
            )


def _spread(rows: Sequence[TrainRow], count: int) -> list[TrainRow]:
    ordered = sorted(rows, key=lambda row: (sum(len(a.ids) for a in row.answers), row.row_id))
    taken = min(count, len(ordered))
    return [ordered[round(i * (len(ordered) - 1) / max(1, taken - 1))] for i in range(taken)]
