"""Do the cached reference log-probs belong to this model? Asked before step 0, answered by re-scoring rows.

Thresholds (nats per token) come from measured noise: the signed mean catches a slightly trained model, which absolute
differences hide in bf16 noise; the absolute mean catches another model, template or mask.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from prefpipe.errors import IdentityError
from prefpipe.forward.layout import Tree
from prefpipe.train.groups import TrainPair

Score = Callable[[Sequence[Tree]], list[list[list[float]]]]
_NOISE = 0.055  # standard deviation per token between 16-bit kernels
_SIGNED, _ABSOLUTE_16, _ABSOLUTE_32, _EXACT_H = 0.01, 0.10, 0.001, 1e-3


@dataclass(frozen=True)
class Audit:
    """What re-scoring found: signed and absolute mean difference per token, and the largest |h| of a pair, in nats."""

    pairs: int
    tokens: int
    signed_mean: float
    absolute_mean: float
    largest_h: float
    loss: float

    def to_dict(self) -> dict[str, float]:
        """For the manifest."""
        return asdict(self)


def audit(pairs: Sequence[TrainPair], rows: int, score: Score, beta: float) -> Audit:
    """Re-score `rows` pairs spread over the data, always with the longest and the shortest."""
    chosen = _spread(pairs, rows)
    differences: list[float] = []
    gaps: list[float] = []
    for pair in chosen:
        (values,) = score([Tree(pair.prompt, (pair.chosen, pair.rejected))])
        cached = (pair.ref_chosen or (), pair.ref_rejected or ())
        check_lengths(pair)
        deltas = [[now - then for now, then in zip(v, c, strict=True)] for v, c in zip(values, cached, strict=True)]
        differences += [d for side in deltas for d in side]
        gaps.append(sum(deltas[0]) - sum(deltas[1]))
    tokens = len(differences)
    return Audit(
        pairs=len(chosen),
        tokens=tokens,
        signed_mean=sum(differences) / tokens,
        absolute_mean=sum(map(abs, differences)) / tokens,
        largest_h=max(map(abs, gaps)) if all(map(math.isfinite, gaps)) else math.inf,
        loss=sum(_softplus(-beta * h) for h in gaps) / len(gaps),
    )


def check_lengths(pair: TrainPair) -> None:
    """Raise IdentityError when cached values are not one per token."""
    for side, ids, values in (("chosen", pair.chosen, pair.ref_chosen), ("rejected", pair.rejected, pair.ref_rejected)):
        if values is not None and len(values) != len(ids):
            raise IdentityError(
                f"pair {pair.pair_id}: {len(values)} cached log-probs for {len(ids)} {side} tokens",
                "the cache was edited or damaged: make the values again with `prefpipe generate`",
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
            f"the cached reference log-probs do not belong to this model: re-scored on {found.pairs} pairs they differ "
            f"by {found.signed_mean:+.4f} per token on average (limit {signed_limit:.4f}) and "
            f"{found.absolute_mean:.4f} in absolute value (limit {absolute_limit}), up to {found.largest_h:.4f} nats "
            f"in one pair; the step-0 loss would be {found.loss:.4f}, not ln 2 = 0.6931",
            "make the values again with `prefpipe generate`, or pass the model, adapter and dtype that made them",
        )


def _spread(pairs: Sequence[TrainPair], rows: int) -> list[TrainPair]:
    ordered = sorted(pairs, key=lambda p: (len(p.chosen) + len(p.rejected), p.pair_id))
    count = min(rows, len(ordered))
    return [ordered[round(i * (len(ordered) - 1) / max(1, count - 1))] for i in range(count)]
