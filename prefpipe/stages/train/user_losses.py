"""Losses of users, `module:function`, before the first step: called on a few rows, where the policy is the reference.

The built-in losses are proven by tests; of these only what a call shows is known.
"""

from collections.abc import Sequence
from dataclasses import replace
from operator import methodcaller
from typing import Any, cast

import numpy as np
import torch

from prefpipe import log, user_functions
from prefpipe.config.losses import LossSettings, Objective
from prefpipe.config.names import is_function
from prefpipe.errors import UsageError
from prefpipe.stages.train import mapped
from prefpipe.stages.train.examples import TrainCompletion, TrainGroup, TrainLabel, TrainPair, TrainRow
from prefpipe.stages.train.loss_batches import scores_prompt
from prefpipe.stages.train.losses import registry
from prefpipe.stages.train.losses.batch import LabelBatch, Logps, LossBatch, PairBatch, RankBatch

_ROWS = 4
_COLUMNS = ("preference_prob", "reward_gap")  # that pairs may lack
_NATS_PER_TOKEN = -2.0  # a log-prob as language models have it
_CONTRACT = "a loss takes (batch, settings) and returns a loss for each row, [B]: docs/losses.md#your-own"
_TOLERANCE = 1e-4  # between a row alone and among others, in float32


def inputs(objective: Objective) -> dict[str, str]:
    """What identifies the losses of users in the fingerprint of a run. Raises UsageError or MissingInputError where
    there is no such function."""
    return {f"loss {name}": user_functions.digest(name, "loss") for name in objective.names if is_function(name)}


def check(objective: Objective, rows: Sequence[TrainRow]) -> None:
    """Call every loss of a user on a few rows: at the reference and a nat beside it, together and one by one. Says its
    value and its gradients at the reference.

    Raises UsageError when it fails, returns another shape than [B], a value or a gradient that is not finite, nothing
    that depends on the policy, or for a row what depends on other rows: micro-batches would change the result.
    """
    registry.load(objective.names)
    few = _few(rows)
    most = max(len(row.completions) for row in few)
    lengths = torch.tensor([[float(c.num_scored) for c in _filled(row, most)] for row in few])
    start = _NATS_PER_TOKEN * lengths
    for name in filter(is_function, objective.names):
        values, gradient = _call(name, few, start, start, objective.settings)
        _call(name, few, start + torch.tensor([1.0, -1.0]).repeat(most)[:most], start, objective.settings)
        alone = [_call(name, [r], start[[i]], start[[i]], objective.settings)[0] for i, r in enumerate(few)]
        if not torch.allclose(values, torch.cat(alone), rtol=_TOLERANCE, atol=_TOLERANCE):
            raise _refused(name, "the loss of a row depends on the other rows of its batch")
        _say(name, few, values, gradient)


def _few(rows: Sequence[TrainRow]) -> list[TrainRow]:
    """The first rows, without the columns that a row somewhere lacks: a batch that holds it will lack them too."""
    few = list(rows[:_ROWS])
    if not isinstance(few[0], TrainPair):
        return few
    lacking = [name for name in _COLUMNS if np.isnan(mapped.column(rows, methodcaller("numbers", name))).any()]
    return [replace(row, **dict.fromkeys(lacking)) for row in few if isinstance(row, TrainPair)] if lacking else few


def _call(
    name: str, rows: Sequence[TrainRow], policy: torch.Tensor, reference: torch.Tensor, settings: LossSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of rows [B] at these log-probs [B, K], and the gradient of their sum."""
    policy = policy.clone().requires_grad_()
    try:
        values: Any = registry.loss(name, _batch(rows, policy, reference, settings), settings)
    except user_functions.STOPS:
        raise
    except BaseException as error:  # of the user's code, which may even call sys.exit
        raise _refused(name, f"it failed: {type(error).__name__}: {error}") from error
    if not isinstance(values, torch.Tensor) or values.shape != (len(rows),):
        found = f"shape {list(values.shape)}" if isinstance(values, torch.Tensor) else type(values).__name__
        raise _refused(name, f"it returned {found}, not [{len(rows)}] for {len(rows)} rows")
    if not values.requires_grad:
        raise _refused(name, "what it returned has no gradient: it was detached, or reads no log-prob of the policy")
    (gradient,) = torch.autograd.grad(values.sum(), policy)
    for what, tensor in {"a value": values.detach(), "a gradient": gradient}.items():
        if not tensor.isfinite().all():
            raise _refused(name, f"{what} is not finite within a nat of the reference: {tensor.flatten().tolist()}")
    return values.detach(), gradient


def _batch(
    rows: Sequence[TrainRow], policy: torch.Tensor, reference: torch.Tensor, settings: LossSettings
) -> LossBatch:
    """What a loss reads of the rows, at these log-probs [B, K]."""
    most = policy.shape[1]
    lengths = torch.tensor([[float(c.num_scored) for c in _filled(row, most)] for row in rows])
    if isinstance(rows[0], TrainGroup):
        present = torch.tensor([[n < len(row.completions) for n in range(most)] for row in rows])
        return RankBatch(Logps(policy, lengths, reference), present)
    if isinstance(rows[0], TrainLabel):
        desirable = torch.tensor([bool(row.desirable) for row in cast("Sequence[TrainLabel]", rows)])
        return LabelBatch(Logps(policy[:, 0], lengths[:, 0], reference[:, 0]), desirable)
    shared = lengths.amin(1) / lengths.clamp(min=1).T  # [2, B]: the part of a side that its prefix is
    chosen, rejected = (
        Logps(policy[:, n], lengths[:, n], reference[:, n], policy[:, n] * shared[n], reference[:, n] * shared[n])
        if settings.ld_alpha != 1
        else Logps(policy[:, n], lengths[:, n], reference[:, n])
        for n in (0, 1)
    )
    pairs = cast("Sequence[TrainPair]", rows)
    nll = Logps(2 * policy[:, 0], 2 * lengths[:, 0]) if scores_prompt(settings) else None
    return PairBatch(
        chosen,
        rejected,
        _column([row.preference_prob for row in pairs]),
        _column([row.reward_gap for row in pairs]),
        nll,
    )


def _filled(row: TrainRow, most: int) -> list[TrainCompletion]:
    """The completions of a row, the last one repeated."""
    return [*row.completions, *[row.completions[-1]] * (most - len(row.completions))]


def _column(values: Sequence[float | None]) -> torch.Tensor | None:
    known = [value for value in values if value is not None]
    return torch.tensor(known) if len(known) == len(values) else None


def _say(name: str, rows: Sequence[TrainRow], values: torch.Tensor, gradient: torch.Tensor) -> None:
    if isinstance(rows[0], TrainLabel):
        good = torch.tensor([bool(row.desirable) for row in cast("Sequence[TrainLabel]", rows)])
        sides = {"desirable": gradient[good], "undesirable": gradient[~good]}
    else:
        sides = {"chosen": gradient[:, 0], "rejected": gradient[:, -1]}
    shown = ", ".join(f"{part.mean():+.3g} for {side}" for side, part in sides.items() if part.numel())
    log.info(f"loss {name}: {values.mean():.4g} where the policy is the reference, its slope there {shown} log-probs")
    if not gradient.any():
        log.warn(f"loss {name} is flat where the policy is the reference: the first step moves nothing")
    better, worse = (part.mean() if part.numel() else torch.zeros(()) for part in sides.values())
    if better > worse:
        log.warn(f"loss {name} falls when what is preferred gets less likely than the other: check its sign")


def _refused(name: str, why: str) -> UsageError:
    return UsageError(f"loss {name} cannot be trained with: {why}", _CONTRACT)
