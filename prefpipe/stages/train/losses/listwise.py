"""Losses of ranked groups: pure functions of a RankBatch and settings, one value per group."""

import torch

from prefpipe.stages.train.losses.batch import LossSettings, RankBatch


def plackett_luce(batch: RankBatch, s: LossSettings) -> torch.Tensor:
    """-sum over k < K of [beta a_k - logsumexp over j >= k of beta a_j], a from best to worst. Rafailov et al. 2023
    (2305.18290), appendix A.3; two completions give DPO."""
    scores = s.beta * batch.completions.ratios
    # Padding must add nothing to a logsumexp; infinities would make its gradient NaN.
    scores = scores.masked_fill(~batch.present, torch.finfo(scores.dtype).min / 2)
    rest = scores.flip(-1).logcumsumexp(-1).flip(-1)
    return (rest - scores).masked_fill(~batch.present, 0.0).sum(-1)
