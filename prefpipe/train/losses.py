"""Preference losses: pure functions of a LossBatch, one value per pair. B = pairs. Log-probs are summed nats."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class LossBatch:
    """Float32 tensors [B]: policy and reference log-probs (summed over completion tokens), and completion lengths."""

    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    ref_chosen_logps: torch.Tensor | None
    ref_rejected_logps: torch.Tensor | None
    chosen_lengths: torch.Tensor
    rejected_lengths: torch.Tensor

    def __post_init__(self) -> None:
        shapes = {t.shape for t in vars(self).values() if t is not None}
        if len(shapes) != 1 or self.chosen_logps.dim() != 1:
            raise ValueError(f"a loss batch holds [B] tensors, got {sorted(map(tuple, shapes))}")


@dataclass(frozen=True)
class LossSpec:
    """A loss function `fn(batch, beta) -> [B]` and whether it reads reference log-probs."""

    fn: Callable[[LossBatch, float], torch.Tensor]
    needs_reference: bool


def sigmoid(batch: LossBatch, beta: float) -> torch.Tensor:
    """DPO: -log sigmoid(beta h), h = (chosen - ref_chosen) - (rejected - ref_rejected). Rafailov et al. 2023, eq. 7."""
    chosen, rejected = log_ratios(batch)
    return -logsigmoid(beta * (chosen - rejected))


def nll(batch: LossBatch, beta: float) -> torch.Tensor:  # noqa: ARG001  (every loss has this signature)
    """Mean per-token negative log-likelihood of the chosen completion: the NLL term of Pang et al. 2024, eq. 1."""
    return -batch.chosen_logps / batch.chosen_lengths


LOSSES: dict[str, LossSpec] = {
    "sigmoid": LossSpec(sigmoid, needs_reference=True),
    "nll": LossSpec(nll, needs_reference=False),
}


def log_ratios(batch: LossBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """log(policy / reference) of chosen and rejected, [B] each. Raises ValueError without reference log-probs."""
    if batch.ref_chosen_logps is None or batch.ref_rejected_logps is None:
        raise ValueError("this loss needs reference log-probs")
    return batch.chosen_logps - batch.ref_chosen_logps, batch.rejected_logps - batch.ref_rejected_logps


def combine(names: Sequence[str], weights: Sequence[float], batch: LossBatch, beta: float) -> torch.Tensor:
    """The weighted sum of losses, [B]."""
    losses = [weight * LOSSES[name].fn(batch, beta) for name, weight in zip(names, weights, strict=True)]
    return torch.stack(losses).sum(dim=0)


def metrics(batch: LossBatch, beta: float) -> Mapping[str, torch.Tensor]:
    """Per-pair metrics under TRL's names, [B] each; a tie counts half in rewards/accuracies."""
    found = {"logps/chosen": batch.chosen_logps, "logps/rejected": batch.rejected_logps}
    if batch.ref_chosen_logps is not None:
        chosen, rejected = log_ratios(batch)
        margin = beta * (chosen - rejected)
        found |= {
            "rewards/chosen": beta * chosen,
            "rewards/rejected": beta * rejected,
            "rewards/margins": margin,
            "rewards/accuracies": (margin > 0).float() + 0.5 * (margin == 0).float(),
        }
    return {name: values.detach() for name, values in found.items()}
