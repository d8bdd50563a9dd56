"""The registry of losses, how they add up, and what is reported beside them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prefpipe.stages.train.losses import listwise, pairwise, unpaired
from prefpipe.stages.train.losses.batch import Kind, LossBatch, LossSettings, at_reference


@dataclass(frozen=True)
class LossSpec:
    """A loss `fn(batch, settings) -> [B]`, the kind of examples it takes, and what it needs of them."""

    fn: Callable[[Any, LossSettings], torch.Tensor]
    kind: Kind = "pairs"
    needs_reference: bool = True
    needs_preference_prob: bool = False
    needs_reward_gap: bool = False
    needs_z0: bool = False


LOSSES: dict[str, LossSpec] = {
    "sigmoid": LossSpec(pairwise.sigmoid),
    "sigmoid_norm": LossSpec(pairwise.sigmoid_norm),
    "hinge": LossSpec(pairwise.hinge),
    "ipo": LossSpec(pairwise.ipo),
    "robust": LossSpec(pairwise.robust),
    "exo_pair": LossSpec(pairwise.exo_pair),
    "nca_pair": LossSpec(pairwise.nca_pair),
    "bco_pair": LossSpec(pairwise.bco_pair),
    "sppo_hard": LossSpec(pairwise.sppo_hard),
    "sppo": LossSpec(pairwise.sppo, needs_preference_prob=True),
    "apo_zero": LossSpec(pairwise.apo_zero),
    "apo_down": LossSpec(pairwise.apo_down),
    "dpop": LossSpec(pairwise.dpop),
    "rdpo": LossSpec(pairwise.rdpo),
    "margin": LossSpec(pairwise.margin, needs_reward_gap=True),
    "odpo": LossSpec(pairwise.odpo, needs_reward_gap=True),
    "soft": LossSpec(pairwise.soft, needs_preference_prob=True),
    "rainbow": LossSpec(pairwise.rainbow),
    "simpo": LossSpec(pairwise.simpo, needs_reference=False),
    "alphapo": LossSpec(pairwise.alphapo, needs_reference=False),
    "cpo": LossSpec(pairwise.cpo, needs_reference=False),
    "orpo": LossSpec(pairwise.orpo, needs_reference=False),
    "nll": LossSpec(pairwise.nll, needs_reference=False),
    "kto": LossSpec(unpaired.kto, kind="labels", needs_z0=True),
    "apo_zero_unpaired": LossSpec(unpaired.apo_zero_unpaired, kind="labels"),
    "plackett_luce": LossSpec(listwise.plackett_luce, kind="groups"),
}


def combine(names: Sequence[str], weights: Sequence[float], batch: LossBatch, s: LossSettings) -> torch.Tensor:
    """The weighted sum of losses, [B]."""
    losses = [weight * LOSSES[name].fn(batch, s) for name, weight in zip(names, weights, strict=True)]
    return torch.stack(losses).sum(dim=0)


@dataclass(frozen=True)
class Departure:
    """Of a step that should start at the reference, [B] each, terms that read no reference left out: the loss, its
    value at log-ratios of 0, and what kernel noise does to that value: its mean shift and the size of one deviation."""

    loss: torch.Tensor
    at_reference: torch.Tensor
    shift: torch.Tensor
    deviation: torch.Tensor


def departure(
    names: Sequence[str], weights: Sequence[float], batch: LossBatch, s: LossSettings, noise: float
) -> Departure:
    """How far the loss is from its value at the reference; `noise` is the standard deviation of the log-prob of a token
    between kernels, in nats, independent from token to token.

    The losses themselves say what it does, at one deviation up or down on either side: a penalty with a corner at 0
    (dpop) leans to one side, a square is moved most where its target is far.
    """
    kept = [(n, w) for n, w in zip(names, weights, strict=True) if LOSSES[n].needs_reference]
    own, own_weights = zip(*kept, strict=True)

    def loss(given: LossBatch) -> torch.Tensor:
        return combine(own, own_weights, given, s).detach()

    still = loss(at_reference(batch))
    moves = torch.stack([loss(at_reference(batch, a, b)) - still for a in (-noise, noise) for b in (-noise, noise)])
    return Departure(loss(batch), still, moves.mean(0), moves.abs().amax(0))
