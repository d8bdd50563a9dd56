"""From an objective to its value: the function of a loss by its name, the weighted sum, its distance from the start.

A name with a colon is a function of the user's, with the arguments and the value of the functions here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from prefpipe import user_functions
from prefpipe.stages.train.losses import listwise, pairwise, unpaired
from prefpipe.stages.train.losses.batch import LabelBatch, LossBatch, PairBatch, RankBatch, at_reference

if TYPE_CHECKING:  # losses see tensors and numbers, and import no configuration
    from prefpipe.config.losses import LossSettings, Objective

_MODULES: dict[type, ModuleType] = {PairBatch: pairwise, LabelBatch: unpaired, RankBatch: listwise}
_of_users: dict[str, Callable[[LossBatch, LossSettings], torch.Tensor]] = {}


def load(names: Iterable[str]) -> None:
    """Find the functions of users among these losses, as they are now: a run never changes its loss on the way.

    Raises UsageError or MissingInputError where there is no such function.
    """
    _of_users.update({name: user_functions.find(name, "loss") for name in names if ":" in name})


def loss(name: str, batch: LossBatch, settings: LossSettings) -> torch.Tensor:
    """The loss of every row, [B]: the function of this name in the module for batches of this kind, or of the user.

    Raises ValueError when the batch lacks what the loss reads.
    """
    if ":" in name:
        if name not in _of_users:
            load([name])
        return _of_users[name](batch, settings)
    return getattr(_MODULES[type(batch)], name)(batch, settings)


def combine(objective: Objective, batch: LossBatch) -> torch.Tensor:
    """The weighted sum of the losses of every row, [B]."""
    weighted = [
        weight * loss(name, batch, objective.settings)
        for name, weight in zip(objective.names, objective.weights, strict=True)
    ]
    return torch.stack(weighted).sum(dim=0)


@dataclass(frozen=True)
class Departure:
    """Per row [B] at step 0: the loss; its value if policy = reference; how far kernel noise moves that value (mean,
    one standard deviation). Reference-free losses are excluded."""

    loss: torch.Tensor
    at_reference: torch.Tensor
    shift: torch.Tensor
    deviation: torch.Tensor


def departure(objective: Objective, batch: LossBatch, noise: float) -> Departure:
    """How far the loss is from its value if policy = reference, where a run starts.

    `noise` is the standard deviation of a token's log-prob between kernels, in nats, independent from token to token.
    Losses are evaluated at +-1 standard deviation of noise on either side instead of linearised: a loss with a corner
    at 0 is not symmetric there, and a square moves most where its target is far.
    """
    anchored = objective.with_reference()

    def values(given: LossBatch) -> torch.Tensor:
        return combine(anchored, given).detach()

    still = values(at_reference(batch))
    moves = torch.stack([values(at_reference(batch, a, b)) - still for a in (-noise, noise) for b in (-noise, noise)])
    return Departure(values(batch), still, moves.mean(0), moves.abs().amax(0))
