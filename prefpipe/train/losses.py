"""The registry of losses, how they add up, and what is reported beside them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prefpipe.train import listwise, pairwise, unpaired
from prefpipe.train.lossbatch import Kind, LabelBatch, Logps, LossBatch, LossSettings, RankBatch


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


def metrics(batch: LossBatch, beta: float) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
    """Metrics under TRL's names: name -> (values [B], which of them count [B]). A tie counts half in accuracies.

    Labels: chosen and rejected are the desirable and the undesirable rows. Groups: the best and the worst completion.
    """
    if isinstance(batch, LabelBatch):
        found = _label_metrics(batch, beta)
    elif isinstance(batch, RankBatch):
        last = batch.present.sum(-1, keepdim=True) - 1
        found = _pair_metrics(_at(batch.completions, torch.zeros_like(last)), _at(batch.completions, last), beta)
    else:
        found = _pair_metrics(batch.chosen, batch.rejected, beta)
    return {name: (values.detach(), counted) for name, (values, counted) in found.items()}


def _at(group: Logps, place: torch.Tensor) -> Logps:
    """One completion [B] of every group, by its place [B, 1]."""
    policy, lengths = (t.gather(-1, place)[:, 0] for t in (group.policy, group.lengths))
    return Logps(policy, lengths, None if group.reference is None else group.reference.gather(-1, place)[:, 0])


def _pair_metrics(chosen: Logps, rejected: Logps, beta: float) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    every = torch.ones_like(chosen.policy)
    found = {"logps/chosen": (chosen.policy, every), "logps/rejected": (rejected.policy, every)}
    if chosen.reference is not None and rejected.reference is not None:
        rewards = beta * chosen.ratios, beta * rejected.ratios
        difference = rewards[0] - rewards[1]
        found |= {
            "rewards/chosen": (rewards[0], every),
            "rewards/rejected": (rewards[1], every),
            "rewards/margins": (difference, every),
            "rewards/accuracies": ((difference > 0).float() + 0.5 * (difference == 0).float(), every),
        }
    return found


def _label_metrics(batch: LabelBatch, beta: float) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    rewards = beta * batch.completion.ratios
    classes = {"chosen": batch.desirable.float(), "rejected": 1 - batch.desirable.float()}
    found = {f"logps/{name}": (batch.completion.policy, counted) for name, counted in classes.items()}
    return found | {f"rewards/{name}": (rewards, counted) for name, counted in classes.items()}
