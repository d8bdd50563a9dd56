"""Do the cached reference log-probs belong to the reference? Asked before step 0, answered by re-scoring rows.

The reference is the initial policy, its base, or a model that the settings name. Its identity is compared first
(`identity`); the audit shows that it also gives these values. The limits are in `forward.agreement`.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from prefpipe.errors import DataError, IdentityError
from prefpipe.forward.agreement import KERNEL_NOISE, absolute_limit, signed_limit
from prefpipe.forward.layout import Tree
from prefpipe.stages.train.examples import TrainRow
from prefpipe.stages.train.mapped import column, in_order_of_ids
from prefpipe.stages.train.micro_batches import tree_of
from prefpipe.stages.train.record_batches import LARGEST_LOGP, Batch

Score = Callable[[Sequence[Tree]], list[list[list[float]]]]  # token log-probs of every completion of every tree
_EXACT_H = 1e-3  # nats: |h| of a row when the same fp32 forward computed both sides


@dataclass(frozen=True)
class Audit:
    """Differences (re-scored minus cached, nats): per token the signed mean, the mean absolute and the root mean square
    (`deviation`); the largest |h| of a row; and the mean of -log sigmoid(beta h), which is ln 2 when nothing differs.

    h is the log-ratio of the first completion of a row minus that of its last; of a single completion its log-ratio.
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
    """Re-score `count` rows spread over the lengths, longest and shortest among them, in one call of `score`."""
    audited = _spread(rows, count)
    for row in audited:
        check_cached(row)
    differences: list[float] = []
    gaps: list[float] = []
    for row, rescored in zip(audited, score([tree_of(row) for row in audited]), strict=True):
        deltas = [
            [now - then for now, then in zip(logps, completion.ref_logps or (), strict=True)]
            for logps, completion in zip(rescored, row.completions, strict=True)
        ]
        differences += [d for of_completion in deltas for d in of_completion]
        gaps.append(sum(deltas[0]) - (sum(deltas[-1]) if len(deltas) > 1 else 0.0))
    tokens = len(differences)
    return Audit(
        rows=len(audited),
        tokens=tokens,
        signed_mean=sum(differences) / tokens,
        absolute_mean=sum(map(abs, differences)) / tokens,
        deviation=math.hypot(*differences) / math.sqrt(tokens),
        largest_h=max(map(abs, gaps)) if all(map(math.isfinite, gaps)) else math.inf,
        loss=sum(_softplus(-beta * h) for h in gaps) / len(gaps),
    )


def check_all_cached(rows: Sequence[TrainRow]) -> None:
    """`check_cached` of every row."""
    for place in np.flatnonzero(column(rows, Batch.suspicious)).tolist():
        check_cached(rows[place])


def check_cached(row: TrainRow) -> None:
    """Raise IdentityError unless there is one cached log-prob per scored token, DataError when one is no
    log-probability, when the prompt has no token, or a completion none that is scored."""
    if not row.prompt_ids:
        raise DataError(f"row {row.row_id} has an empty prompt", "a completion is predicted from at least one token")
    for completion in row.completions:
        values = completion.ref_logps or ()
        if not completion.num_scored:
            raise DataError(
                f"row {row.row_id}: completion {completion.completion_id} is empty, or no token is scored",
                "leave the row out: a completion ends at least with an end-of-sequence token",
            )
        if not all(map(math.isfinite, values)):
            raise DataError(
                f"row {row.row_id}: a cached log-prob of completion {completion.completion_id} is not a finite number",
                "make the values again with `prefpipe score`; a value is never replaced by a guess",
            )
        if max(values, default=0.0) > LARGEST_LOGP:
            raise DataError(
                f"row {row.row_id}: a cached log-prob of completion {completion.completion_id} is {max(values):.4g} "
                "nats; the logarithm of a probability is never above 0",
                "make the values again with `prefpipe score`: these may be negated, or logits",
            )
        if completion.ref_logps is not None and len(values) != completion.num_scored:
            raise IdentityError(
                f"row {row.row_id}: {len(values)} cached log-probs for {completion.num_scored} tokens of "
                f"completion {completion.completion_id}",
                "the cache was edited or damaged: make the values again with `prefpipe score`",
            )


def _softplus(x: float) -> float:
    """log(1 + exp(x)) without overflow."""
    return max(0.0, x) + math.log1p(math.exp(-abs(x)))


def check(result: Audit, *, exact: bool, full_precision: bool) -> None:
    """Raise IdentityError when the cache does not belong to the model. `exact`: the same fp32 scorer on both sides;
    `full_precision`: float32 on both sides."""
    signed, absolute = signed_limit(result.tokens), absolute_limit(full_precision=full_precision)
    # A comparison with NaN is False, and must refuse.
    good = abs(result.signed_mean) <= signed and result.absolute_mean <= absolute
    if not good or (exact and not result.largest_h <= _EXACT_H):
        raise IdentityError(
            f"the cached reference log-probs do not belong to this model: re-scored on {result.rows} rows they differ "
            f"by {result.signed_mean:+.4f} per token on average (limit {signed:.4f}) and "
            f"{result.absolute_mean:.4f} in absolute value (limit {absolute}), up to {result.largest_h:.4f} nats "
            f"in one row; -log sigmoid(beta h) would be {result.loss:.4f} at step 0, not ln 2 = 0.6931",
            "make the values again with `prefpipe generate`, or pass the model, adapter and dtype that made them",
        )


def noise_between_kernels(deviation: float, *, full_precision: bool) -> float:
    """Standard deviation, in nats, of the log-prob of a token around its cached value when nothing is wrong: what the
    audit measured. In 16 bits it is never less than the noise between kernels, since a training step computes other
    shapes than the audit."""
    return deviation if full_precision else max(deviation, KERNEL_NOISE)


def check_scorers(scorers: Iterable[str], version: int) -> None:
    """Raise IdentityError for values of another version of this project's forward pass. Values of engines and of other
    dtypes are judged by re-scoring."""
    for name in sorted(scorers):
        forward = re.match(r"forward-(\d+)/", name)
        if forward and int(forward[1]) != version:
            raise IdentityError(
                f"the cached reference log-probs were made by scorer {name}, this is forward-{version}",
                "make the values again: prefpipe score, whose output takes the place of these rows",
            )


def _spread(rows: Sequence[TrainRow], count: int) -> list[TrainRow]:
    """Rows at even distances in the order of their tokens, rows of equally many by their ids."""
    lengths = column(rows, Batch.completion_tokens)
    ordered = np.sort(lengths)
    taken = min(count, len(rows))
    found: list[TrainRow] = []
    length, alike = -1, np.zeros(0, np.int64)
    for place in (round(i * (len(rows) - 1) / max(1, taken - 1)) for i in range(taken)):
        if ordered[place] != length:
            length = ordered[place]
            alike = in_order_of_ids(rows, np.flatnonzero(lengths == length))
        found.append(rows[int(alike[place - int(np.searchsorted(ordered, length))])])
    return found
