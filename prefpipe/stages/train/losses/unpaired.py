"""Losses of labelled completions: functions of a LabelBatch and the settings that they read, one value per row, [B].

In the formulas: x = log(policy / reference) of the completion, z0 = KTO's reference point, s = sigmoid. The name of a
function is the name of its loss, whose other facts stand in prefpipe/config/losses.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from prefpipe.stages.train.losses.batch import LabelBatch

if TYPE_CHECKING:  # what `settings` holds; losses see tensors and numbers, and import no configuration
    from prefpipe.config.losses import LossSettings


def kto(batch: LabelBatch, settings: LossSettings) -> torch.Tensor:
    """lambda_D (1 - s(beta (x - z0))) for a desirable row, lambda_U (1 - s(beta (z0 - x))) for an undesirable one, with
    the class weights lambda_D = desirable_weight and lambda_U = undesirable_weight. Ethayarajh et al. 2024
    (2402.01306), eq. 8. z0 is on the scale of x; it is no estimate of the KL divergence of the policy."""
    return _weighted(batch, settings, settings.beta * (batch.completion.log_ratios - batch.z0))


def apo_zero_unpaired(batch: LabelBatch, settings: LossSettings) -> torch.Tensor:
    """KTO with z0 = 0: APO-zero of D'Oosterlinck et al. 2024 (2408.06266), for rows that are not pairs."""
    return _weighted(batch, settings, settings.beta * batch.completion.log_ratios)


def reference_point(total: float, rows: int) -> float:
    """KTO's reference point z0 = max(0, total / rows): the mean log-ratio (nats) of mismatched rows, from the sum over
    all ranks. Ethayarajh et al. 2024 (2402.01306)."""
    return max(0.0, total / rows)


def _weighted(batch: LabelBatch, settings: LossSettings, x: torch.Tensor) -> torch.Tensor:
    # 1 - s(x) is s(-x): without cancellation for large x.
    return torch.where(
        batch.desirable, settings.desirable_weight * (-x).sigmoid(), settings.undesirable_weight * x.sigmoid()
    )
