"""The registry of losses, how they add up, and what is reported beside them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise as neighbours
from typing import Any

import torch

from prefpipe.train import listwise, pairwise, unpaired
from prefpipe.train.lossbatch import (
    Kind,
    LabelBatch,
    Logps,
    LossBatch,
    LossSettings,
    PairBatch,
    RankBatch,
    at_reference,
)


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
) -> Departure:  # fmt: skip
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


Counted = tuple[torch.Tensor, torch.Tensor]  # values [B], and which of them count [B]
LENGTH_EDGES = (64, 256, 1024)  # tokens of both completions of a pair, inclusive; as parity.json's of one
_SATURATED = 0.01  # gradient weight s(-beta h) below which a pair teaches nothing more


def metrics(batch: LossBatch, beta: float, *, on_reference: bool = False) -> Mapping[str, Counted]:
    """Metrics under TRL's names where it has them: docs/diagnostics.md lists all. A tie counts half in accuracies.

    Labels: chosen and rejected are the desirable and the undesirable rows. Groups: the best and the worst completion.
    `on_reference`: the completions were sampled from the reference, so that KL(ref || policy) can be read off them.
    """
    if isinstance(batch, LabelBatch):
        found = _label_metrics(batch, beta)
        sides = [batch.completion]
    else:
        chosen, rejected = _ends(batch)
        found = _pair_metrics(chosen, rejected, beta)
        sides = [chosen, rejected]
    if on_reference and all(side.reference is not None for side in sides):
        found |= _divergence(sides)
    return {name: (values.detach(), counted) for name, (values, counted) in found.items()}


def _ends(batch: PairBatch | RankBatch) -> tuple[Logps, Logps]:
    """Chosen and rejected of a pair; the best and the worst of a group."""
    if isinstance(batch, PairBatch):
        return batch.chosen, batch.rejected
    last = batch.present.sum(-1, keepdim=True) - 1
    return _at(batch.completions, torch.zeros_like(last)), _at(batch.completions, last)


def _at(group: Logps, place: torch.Tensor) -> Logps:
    """One completion [B] of every group, by its place [B, 1]."""
    policy, lengths = (t.gather(-1, place)[:, 0] for t in (group.policy, group.lengths))
    return Logps(policy, lengths, None if group.reference is None else group.reference.gather(-1, place)[:, 0])


def _pair_metrics(chosen: Logps, rejected: Logps, beta: float) -> dict[str, Counted]:
    found = {
        "logps/chosen": chosen.policy,
        "logps/rejected": rejected.policy,
        "logps/accuracies": _wins(chosen.policy - rejected.policy),
        "lengths/chosen": chosen.lengths,
        "lengths/rejected": rejected.lengths,
    }
    if chosen.reference is not None and rejected.reference is not None:
        a, b = chosen.ratios, rejected.ratios
        difference = beta * a - beta * b
        weight = (-difference).sigmoid()
        found |= {
            "rewards/chosen": beta * a,
            "rewards/rejected": beta * b,
            "rewards/margins": difference,
            "rewards/accuracies": _wins(difference),
            "rewards/abs_margins": difference.abs(),
            "rewards/gradient_weights": weight,
            "rewards/saturated": (weight < _SATURATED).float(),
            "rewards/both_fall": ((a < 0) & (b < 0)).float(),
            "deltas/chosen": _per_token(chosen),
            "deltas/rejected": _per_token(rejected),
        }
    every = torch.ones_like(chosen.policy)
    counted = {name: (values, every) for name, values in found.items()}
    if "rewards/margins" not in found:
        return counted
    return counted | _by_length(found["rewards/margins"], chosen.lengths + rejected.lengths)


def _by_length(margins: torch.Tensor, lengths: torch.Tensor) -> dict[str, Counted]:
    """The margins of the pairs in each bucket of lengths."""
    edges = [0, *LENGTH_EDGES, math.inf]
    return {
        f"rewards/margins/len_{low}_{high}": (margins, ((lengths > low) & (lengths <= high)).float())
        for low, high in neighbours(edges)
    }


def _label_metrics(batch: LabelBatch, beta: float) -> dict[str, Counted]:
    own = batch.completion
    values = {"logps": own.policy, "rewards": beta * own.ratios, "lengths": own.lengths, "deltas": _per_token(own)}
    classes = {"chosen": batch.desirable.float(), "rejected": 1 - batch.desirable.float()}
    return {f"{name}/{label}": (value, counted) for name, value in values.items() for label, counted in classes.items()}


def _divergence(sides: Sequence[Logps]) -> dict[str, Counted]:
    """KL(ref || policy) from samples of the reference: the mean of log(ref / policy), in nats and nats per token."""
    every = torch.ones_like(sides[0].policy)
    nats = -torch.stack([side.ratios for side in sides]).mean(0)
    per_token = -torch.stack([_per_token(side) for side in sides]).mean(0)
    return {"kl/ref_policy": (nats, every), "kl/ref_policy_per_token": (per_token, every)}


def _per_token(side: Logps) -> torch.Tensor:
    return side.ratios / side.lengths.clamp(min=1)


def _wins(difference: torch.Tensor) -> torch.Tensor:
    """1 above 0, 0 below, half for a tie."""
    return (difference > 0).float() + 0.5 * (difference == 0).float()
