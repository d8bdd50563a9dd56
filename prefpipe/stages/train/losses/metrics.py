"""What is reported beside the loss: metrics of a batch, under TRL's names where it has them."""

from collections.abc import Mapping, Sequence

import torch

from prefpipe.forward.agreement import LENGTH_BUCKETS
from prefpipe.stages.train.losses.batch import LabelBatch, Logps, LossBatch, PairBatch, RankBatch

Counted = tuple[torch.Tensor, torch.Tensor]  # values [B], and which of them count [B]
_DEVIATIONS = 4
_FLOAT32_NOISE = 1e-5  # nats: the log-prob of a token moves by less when its row is packed otherwise
_BY_SOURCE = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/accuracies")
_SATURATED = 0.01  # gradient weight s(-beta h) below which a pair teaches nothing more


def metrics(
    batch: LossBatch, beta: float, *, on_reference: bool = False, noise: float | None = None
) -> Mapping[str, Counted]:
    """Metrics by name, each as its values and the rows that count, [B]; docs/diagnostics.md explains them.

    "chosen" and "rejected" are the sides of a pair, the desirable and the undesirable rows of labels, the best and the
    worst completion of a group. A tie counts half in accuracies. `on_reference` says that the completions were sampled
    from the reference: then KL(reference || policy) is among the metrics. `noise` says that the policy is still the
    reference, up to this standard deviation of a token's log-prob (nats): an h that noise explains is then a tie.
    """
    if isinstance(batch, LabelBatch):
        found = _label_metrics(batch, beta)
        sides = [batch.completion]
    else:
        chosen, rejected = _ends(batch)
        found = _pair_metrics(chosen, rejected, beta, noise)
        sides = [chosen, rejected]
    if on_reference and all(side.reference_logps is not None for side in sides):
        found |= _divergence(sides)
    return {name: (values.detach(), counted) for name, (values, counted) in found.items()}


def by_source(
    shown: Mapping[str, Counted], losses: torch.Tensor, kind: str, sources: Sequence[int]
) -> Mapping[str, Counted]:
    """Loss, accuracies and margin of the rows [B] of every source, as `pairs.0/loss`: `kind` and the number of the
    source, as the inputs of a run are called in its manifest. `shown` are the metrics of all rows."""
    every = torch.ones_like(losses)
    split = {"loss": (losses.detach(), every), **{name: shown[name] for name in _BY_SOURCE if name in shown}}
    of_row = torch.tensor(sources, device=losses.device)
    return {
        f"{kind}.{source}/{name}": (values, counted * (of_row == source))
        for source in sorted(set(sources))
        for name, (values, counted) in split.items()
    }


def _ends(batch: PairBatch | RankBatch) -> tuple[Logps, Logps]:
    """Chosen and rejected of a pair; the best and the worst completion of a group."""
    if isinstance(batch, PairBatch):
        return batch.chosen, batch.rejected
    last = batch.present.sum(-1, keepdim=True) - 1
    return _at(batch.completions, torch.zeros_like(last)), _at(batch.completions, last)


def _at(group: Logps, place: torch.Tensor) -> Logps:
    """One completion [B] of every group, by its place [B, 1]."""
    policy, lengths = (t.gather(-1, place)[:, 0] for t in (group.policy_logps, group.lengths))
    reference = None if group.reference_logps is None else group.reference_logps.gather(-1, place)[:, 0]
    return Logps(policy, lengths, reference)


def _pair_metrics(chosen: Logps, rejected: Logps, beta: float, noise: float | None) -> dict[str, Counted]:
    found = {
        "logps/chosen": chosen.policy_logps,
        "logps/rejected": rejected.policy_logps,
        "logps/accuracies": _wins(chosen.policy_logps - rejected.policy_logps),
        "lengths/chosen": chosen.lengths,
        "lengths/rejected": rejected.lengths,
    }
    if chosen.reference_logps is not None and rejected.reference_logps is not None:
        a, b = chosen.log_ratios, rejected.log_ratios
        difference = beta * a - beta * b
        weight = (-difference).sigmoid()
        found |= {
            "rewards/chosen": beta * a,
            "rewards/rejected": beta * b,
            "rewards/margins": difference,
            "rewards/accuracies": _wins(a - b, _within(noise, chosen, rejected)),
            "rewards/abs_margins": difference.abs(),
            "rewards/gradient_weights": weight,
            "rewards/saturated": (weight < _SATURATED).float(),
            "rewards/both_fall": ((a < 0) & (b < 0)).float(),
            "deltas/chosen": _per_token(chosen),
            "deltas/rejected": _per_token(rejected),
        }
    every = torch.ones_like(chosen.policy_logps)
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
    side = batch.completion
    values = {
        "logps": side.policy_logps,
        "rewards": beta * side.log_ratios,
        "lengths": side.lengths,
        "deltas": _per_token(side),
    }
    classes = {"chosen": batch.desirable.float(), "rejected": 1 - batch.desirable.float()}
    return {f"{name}/{label}": (value, counted) for name, value in values.items() for label, counted in classes.items()}


def _divergence(sides: Sequence[Logps]) -> dict[str, Counted]:
    """KL(reference || policy) from samples of the reference: log(reference / policy), the mean over the sides, in nats
    and in nats per token."""
    every = torch.ones_like(sides[0].policy_logps)
    nats = -torch.stack([side.log_ratios for side in sides]).mean(0)
    per_token = -torch.stack([_per_token(side) for side in sides]).mean(0)
    return {"kl/ref_policy": (nats, every), "kl/ref_policy_per_token": (per_token, every)}


def _per_token(side: Logps) -> torch.Tensor:
    return side.log_ratios / side.lengths.clamp(min=1)


def _within(noise: float | None, chosen: Logps, rejected: Logps) -> torch.Tensor | float:
    """How far h = a - b (nats, [B]) may be from 0 by noise alone: four standard deviations, with independent tokens."""
    if noise is None:
        return 0.0
    return _DEVIATIONS * max(noise, _FLOAT32_NOISE) * (chosen.lengths + rejected.lengths).sqrt()


def _wins(difference: torch.Tensor, tie: torch.Tensor | float = 0.0) -> torch.Tensor:
    """1 above `tie`, 0 below -`tie`, half between them."""
    return (difference > tie).float() + 0.5 * (difference.abs() <= tie).float()
