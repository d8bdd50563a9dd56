"""What a loss reads: log-probs of the completions of B rows as tensors. No model, no files.

Three kinds of rows: a pair (chosen, rejected), a label (one completion, desirable or not), a group (K completions from
best to worst). Log-probs are in nats, summed over the tokens of a completion.
"""

from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True)
class Logps:
    """Log-probs of completions: float tensors of one shape, [B] or [B, K]. Raises ValueError for several shapes.

    `lengths` counts tokens. The prefix sums run over the tokens before the end of the shorter side of a pair; LD-DPO
    alone reads them.
    """

    policy_logps: torch.Tensor
    lengths: torch.Tensor
    reference_logps: torch.Tensor | None = None
    policy_prefix_logps: torch.Tensor | None = None
    reference_prefix_logps: torch.Tensor | None = None

    def __post_init__(self) -> None:
        shapes = {t.shape for t in vars(self).values() if t is not None}
        if len(shapes) != 1:
            raise ValueError(f"log-probs of different shapes: {sorted(map(tuple, shapes))}")

    @property
    def mean_logps(self) -> torch.Tensor:
        """Log-probs per token under the policy; 0 for a completion without tokens."""
        return self.policy_logps / self.lengths.clamp(min=1)

    @property
    def log_ratios(self) -> torch.Tensor:
        """log(policy / reference) in nats. Raises ValueError without reference log-probs."""
        if self.reference_logps is None:
            raise ValueError("this loss needs reference log-probs")
        return self.policy_logps - self.reference_logps


@dataclass(frozen=True)
class PairBatch:
    """B pairs, [B] in every tensor. Raises ValueError for other shapes.

    `preference_prob` is P(chosen is better) and `reward_gap` the difference of the rewards, as the data has them. `nll`
    holds prompt and chosen completion together, for an NLL term that covers both.
    """

    chosen: Logps
    rejected: Logps
    preference_prob: torch.Tensor | None = None
    reward_gap: torch.Tensor | None = None
    nll: Logps | None = None

    def __post_init__(self) -> None:
        optional = (self.preference_prob, self.reward_gap, self.nll.policy_logps if self.nll else None)
        tensors = [self.chosen.policy_logps, self.rejected.policy_logps, *(t for t in optional if t is not None)]
        if len({t.shape for t in tensors}) != 1 or self.chosen.policy_logps.dim() != 1:
            raise ValueError(f"a batch of pairs holds [B] tensors, got {[tuple(t.shape) for t in tensors]}")


@dataclass(frozen=True)
class LabelBatch:
    """B completions, their labels (bool [B]), and KTO's reference point z0, a scalar without gradient.

    Raises ValueError for other shapes.
    """

    completion: Logps
    desirable: torch.Tensor
    z0: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def __post_init__(self) -> None:
        if (
            self.completion.policy_logps.dim() != 1
            or self.desirable.shape != self.completion.policy_logps.shape
            or self.z0.dim()
        ):
            raise ValueError(f"labels are [B] and z0 is a scalar, got {self.desirable.shape} and {self.z0.shape}")


@dataclass(frozen=True)
class RankBatch:
    """B groups of up to K completions from best to worst, [B, K]; `present` (bool [B, K]) is False for padding.

    Raises ValueError for other shapes.
    """

    completions: Logps
    present: torch.Tensor

    def __post_init__(self) -> None:
        if self.completions.policy_logps.dim() != 2 or self.present.shape != self.completions.policy_logps.shape:
            raise ValueError(f"groups are [B, K], got {self.completions.policy_logps.shape} and {self.present.shape}")


LossBatch = PairBatch | LabelBatch | RankBatch


def at_reference(batch: LossBatch, better: float = 0.0, worse: float = 0.0) -> LossBatch:
    """The same rows with reference log-probs as if the policy were the reference: log-ratios and z0 are 0.

    `better` and `worse` are noise in nats per token. With them the log-ratio of a completion of n tokens is
    better * sqrt(n), and worse * sqrt(n) for a rejected or lower-ranked one.
    """
    if isinstance(batch, PairBatch):
        return replace(batch, chosen=_moved(batch.chosen, better), rejected=_moved(batch.rejected, worse))
    if isinstance(batch, LabelBatch):
        return replace(batch, completion=_moved(batch.completion, better), z0=torch.zeros_like(batch.z0))
    size = batch.present.shape[-1]
    noise = torch.tensor([better, *[worse] * (size - 1)], device=batch.present.device)
    return replace(batch, completions=_moved(batch.completions, noise))


def _moved(side: Logps, noise: float | torch.Tensor) -> Logps:
    """Reference log-probs with which the log-ratios are noise * sqrt(tokens); the prefix holds all of that noise."""
    log_ratios = noise * side.lengths.sqrt()
    prefix = None if side.policy_prefix_logps is None else side.policy_prefix_logps - log_ratios
    return replace(side, reference_logps=side.policy_logps - log_ratios, reference_prefix_logps=prefix)
