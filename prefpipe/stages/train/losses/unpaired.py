"""Losses of labelled completions: pure functions of a LabelBatch and settings, one value per row.

x = log(policy / reference) of the completion; s = sigmoid.
"""

import torch

from prefpipe.stages.train.losses.batch import LabelBatch, LossSettings


def kto(batch: LabelBatch, s: LossSettings) -> torch.Tensor:
    """lambda_y - v: desirable lambda_D (1 - s(beta (x - z0))), undesirable lambda_U (1 - s(beta (z0 - x))).
    Ethayarajh et al. 2024 (2402.01306), eq. 8. z0 is on the scale of x; it is no estimate of the KL of the policy."""
    return _weighted(batch, s, s.beta * (batch.completion.ratios - batch.z0))


def apo_zero_unpaired(batch: LabelBatch, s: LossSettings) -> torch.Tensor:
    """KTO with z0 = 0: D'Oosterlinck et al. 2024 (2408.06266), for rows that are not pairs."""
    return _weighted(batch, s, s.beta * batch.completion.ratios)


def reference_point(total: float, rows: int) -> float:
    """z0 = max(0, mean log-ratio of mismatched rows), from their sum over all ranks. Ethayarajh et al. 2024."""
    return max(0.0, total / rows)


def _weighted(batch: LabelBatch, s: LossSettings, x: torch.Tensor) -> torch.Tensor:
    # 1 - s(x) is s(-x): without cancellation for large x.
    return torch.where(batch.desirable, s.desirable_weight * (-x).sigmoid(), s.undesirable_weight * x.sigmoid())
