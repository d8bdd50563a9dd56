"""What a loss reads: log-probs of the completions of B examples as tensors, and the settings. No model, no files.

Three kinds of examples: a pair (chosen, rejected), a label (one completion, desirable or not), a group (K completions
from best to worst). Log-probs are in nats, summed over completion tokens.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch

Kind = Literal["pairs", "labels", "groups"]


@dataclass(frozen=True)
class Logps:
    """Float tensors of one shape, [B] or [B, K]: sums under the policy, token counts, sums under the reference.

    The prefix sums run over the tokens before the end of the shorter side of a pair (LD-DPO alone asks for them).
    """

    policy: torch.Tensor
    lengths: torch.Tensor
    reference: torch.Tensor | None = None
    policy_prefix: torch.Tensor | None = None
    reference_prefix: torch.Tensor | None = None

    def __post_init__(self) -> None:
        shapes = {t.shape for t in vars(self).values() if t is not None}
        if len(shapes) != 1:
            raise ValueError(f"log-probs of different shapes: {sorted(map(tuple, shapes))}")

    @property
    def means(self) -> torch.Tensor:
        """Policy log-probs per token; a completion without tokens has 0."""
        return self.policy / self.lengths.clamp(min=1)

    @property
    def ratios(self) -> torch.Tensor:
        """log(policy / reference). Raises ValueError without reference log-probs."""
        if self.reference is None:
            raise ValueError("this loss needs reference log-probs")
        return self.policy - self.reference


@dataclass(frozen=True)
class PairBatch:
    """Chosen and rejected of B pairs, [B] each; preference_prob = P(chosen is better); reward_gap in the data.

    `nll` is what an NLL term covers when it is not the chosen completion alone (prompt and chosen completion).
    """

    chosen: Logps
    rejected: Logps
    preference_prob: torch.Tensor | None = None
    reward_gap: torch.Tensor | None = None
    nll: Logps | None = None

    def __post_init__(self) -> None:
        optional = (self.preference_prob, self.reward_gap, self.nll.policy if self.nll else None)
        tensors = [self.chosen.policy, self.rejected.policy, *(t for t in optional if t is not None)]
        if len({t.shape for t in tensors}) != 1 or self.chosen.policy.dim() != 1:
            raise ValueError(f"a batch of pairs holds [B] tensors, got {[tuple(t.shape) for t in tensors]}")


@dataclass(frozen=True)
class LabelBatch:
    """B completions with their labels (bool [B]), and KTO's reference point z0, a scalar without gradient."""

    completion: Logps
    desirable: torch.Tensor
    z0: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def __post_init__(self) -> None:
        if self.completion.policy.dim() != 1 or self.desirable.shape != self.completion.policy.shape or self.z0.dim():
            raise ValueError(f"labels are [B] and z0 is a scalar, got {self.desirable.shape} and {self.z0.shape}")


@dataclass(frozen=True)
class RankBatch:
    """B groups of up to K completions from best to worst, [B, K]; `present` (bool [B, K]) is False for padding."""

    completions: Logps
    present: torch.Tensor

    def __post_init__(self) -> None:
        if self.completions.policy.dim() != 2 or self.present.shape != self.completions.policy.shape:
            raise ValueError(f"groups are [B, K], got {self.completions.policy.shape} and {self.present.shape}")


LossBatch = PairBatch | LabelBatch | RankBatch


def at_reference(batch: LossBatch, better: float = 0.0, worse: float = 0.0) -> LossBatch:
    """The batch of a policy that is the reference: log-ratios and z0 are 0.

    `better` and `worse` are noise in nats per token: with them the log-ratio of a completion of n tokens is
    better * sqrt(n), that of a rejected or lower-ranked one worse * sqrt(n).
    """
    if isinstance(batch, PairBatch):
        return replace(batch, chosen=_moved(batch.chosen, better), rejected=_moved(batch.rejected, worse))
    if isinstance(batch, LabelBatch):
        return replace(batch, completion=_moved(batch.completion, better), z0=torch.zeros_like(batch.z0))
    size = batch.present.shape[-1]
    noise = torch.tensor([better, *[worse] * (size - 1)], device=batch.present.device)
    return replace(batch, completions=_moved(batch.completions, noise))


def _moved(side: Logps, noise: float | torch.Tensor) -> Logps:
    """Reference values at which the log-ratios are noise * sqrt(tokens); all of it before the end of the prefix."""
    ratios = noise * side.lengths.sqrt()
    prefix = None if side.policy_prefix is None else side.policy_prefix - ratios
    return replace(side, reference=side.policy - ratios, reference_prefix=prefix)


@dataclass(frozen=True)
class LossSettings:
    """The numbers that losses read, under their names in TrainConfig, which explains them."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.0
    simpo_gamma_beta_ratio: float = 0.5
    alphapo_alpha: float = 0.25
    ipo_reduction: str = "sum"
    dpop_lambda: float = 50.0
    rdpo_alpha: float = 0.01
    margin_alpha: float = 1.0
    ld_alpha: float = 1.0
    rainbow_mix: float = 0.25
    rainbow_margin: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
