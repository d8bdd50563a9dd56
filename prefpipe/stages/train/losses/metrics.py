"""What is reported beside the loss: metrics of a batch, under TRL's names where it has them."""

from collections.abc import Mapping, Sequence

import torch

from prefpipe.forward.agreement import LENGTH_BUCKETS
from prefpipe.stages.train.losses.batch import LabelBatch, Logps, LossBatch, PairBatch, RankBatch

Counted = tuple[torch.Tensor, torch.Tensor]  # values [B], and which of them count [B]
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
    """The margins of the pairs in each bucket of lengths, chosen and rejected together."""
    return {
        f"rewards/margins/len_{low}_{high}": (margins, ((lengths > low) & (lengths <= high)).float())
        for low, high in LENGTH_BUCKETS
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
