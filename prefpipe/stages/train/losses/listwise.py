"""Losses of ranked groups: functions of a RankBatch and the settings that they read, one value per group, [B].

The name of a function is the name of its loss, whose other facts stand in prefpipe/config/losses.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from prefpipe.stages.train.losses.batch import RankBatch

if TYPE_CHECKING:  # what `settings` holds; losses see tensors and numbers, and import no configuration
    from prefpipe.config.losses import LossSettings


def plackett_luce(batch: RankBatch, settings: LossSettings) -> torch.Tensor:
    """-sum over k < K of [beta a_k - logsumexp over j >= k of beta a_j], where a_1 .. a_K are the log-ratios of the
    completions from best to worst. Rafailov et al. 2023 (2305.18290), appendix A.3. Two completions give DPO."""
    scores = settings.beta * batch.completions.log_ratios
    # Padding must add nothing to a logsumexp; infinities would make its gradient NaN.
    scores = scores.masked_fill(~batch.present, torch.finfo(scores.dtype).min / 2)
    rest = scores.flip(-1).logcumsumexp(-1).flip(-1)
    return (rest - scores).masked_fill(~batch.present, 0.0).sum(-1)
