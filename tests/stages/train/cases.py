"""Batches of losses from plain rows of numbers, their settings, and the four rows that golden values belong to."""

import torch

from prefpipe.config.losses import LossSettings, Objective
from prefpipe.stages.train.losses.batch import LabelBatch, Logps, PairBatch, RankBatch

Row = tuple[float, ...]  # chosen, rejected, ref_chosen, ref_rejected, chosen length, rejected length

A: Row = (-40.0, -55.0, -42.0, -50.0, 20.0, 25.0)
B: Row = (-45.0, -60.0, -42.0, -50.0, 20.0, 25.0)
C: Row = (-2000.0, -1800.0, -1990.0, -1805.0, 900.0, 800.0)
D: Row = (-0.5, -3.0, -0.7, -2.0, 1.0, 2.0)


def pairs(
    *rows: Row, dtype: torch.dtype = torch.float64, prob: float | None = None, gap: float | None = None
) -> PairBatch:  # fmt: skip
    """A batch of pairs; the prefix sums of LD-DPO are half of the sums."""
    c, r, c0, r0, w, length = torch.tensor(rows, dtype=dtype).T
    return PairBatch(
        chosen=Logps(c, w, c0, c / 2, c0 / 2),
        rejected=Logps(r, length, r0, r / 2, r0 / 2),
        preference_prob=None if prob is None else torch.full_like(c, prob),
        reward_gap=None if gap is None else torch.full_like(c, gap),
    )


def labels(
    *rows: tuple[float, float, bool], z0: float = 0.0, dtype: torch.dtype = torch.float64
) -> LabelBatch:  # fmt: skip
    """Rows are (log-prob, reference log-prob, desirable)."""
    policy, reference = (torch.tensor([row[i] for row in rows], dtype=dtype) for i in (0, 1))
    desirable = torch.tensor([row[2] for row in rows])
    return LabelBatch(Logps(policy, torch.ones_like(policy), reference), desirable, torch.tensor(z0, dtype=dtype))


def ranks(*groups: list[float], dtype: torch.dtype = torch.float64) -> RankBatch:
    """Log-ratios of the completions of every group from best to worst (the reference is 0), padded to the longest."""
    most = max(map(len, groups))
    policy = torch.tensor([[*own, *[7.0] * (most - len(own))] for own in groups], dtype=dtype)
    present = torch.tensor([[i < len(own) for i in range(most)] for own in groups])
    return RankBatch(Logps(policy, torch.ones_like(policy), torch.zeros_like(policy)), present)


def beta(value: float, **others: float | str) -> LossSettings:
    """Settings with this beta."""
    return LossSettings(beta=value, **others)  # type: ignore[arg-type]  (names are checked when it is called)


def objective(settings: LossSettings, **weights: float) -> Objective:
    """These losses with their weights."""
    return Objective(tuple(weights), tuple(weights.values()), settings)


class Recorder:
    """Settings that remember which of them are read."""

    def __init__(self, values: LossSettings) -> None:
        self.values, self.read = values, set[str]()

    def __getattr__(self, name: str) -> float | str:
        self.read.add(name)
        return getattr(self.values, name)
