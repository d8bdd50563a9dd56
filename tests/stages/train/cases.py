"""Batches of losses from plain rows of numbers, and the four rows that golden values belong to."""

import math

import torch

from prefpipe.stages.train.losses.batch import LabelBatch, Logps, LossSettings, PairBatch, RankBatch

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


class Recorder:
    """Settings that remember which of them are read."""

    def __init__(self, values: LossSettings) -> None:
        self.values, self.read = values, set[str]()

    def __getattr__(self, name: str) -> float | str:
        self.read.add(name)
        return getattr(self.values, name)


LN2 = math.log(2)
# Loss, settings, and the value where the policy is the reference: chosen of 5 tokens, rejected of 15.
AT_REFERENCE: dict[str, tuple[LossSettings, float]] = {
    **{name: (beta(0.1), LN2) for name in ("sigmoid", "sigmoid_norm", "dpop", "soft")},
    "robust": (beta(0.1, label_smoothing=0.2), LN2),
    "hinge": (beta(0.1), 1.0),
    "ipo": (beta(0.1), 25.0),
    "nca_pair": (beta(0.1), 2 * LN2),
    "bco_pair": (beta(0.1), 2 * LN2),
    "apo_zero": (beta(0.1), 1.0),
    "apo_down": (beta(0.1), 1.0),
    "exo_pair": (beta(0.1, label_smoothing=1e-3), -LN2 - 0.5 * math.log(1e-3 * (1 - 1e-3))),
    "sppo_hard": (beta(0.1), 50.0),
    "sppo": (beta(0.1), 9.0),  # ((0.8 - 0.5) / 0.1)^2, twice, halved
    "rdpo": (beta(0.1), math.log1p(math.exp(0.1))),  # alpha (|w| - |l|) = 0.01 (5 - 15)
    "margin": (beta(0.1), math.log1p(math.exp(1.5))),
    "odpo": (beta(0.1), math.log1p(1.5)),  # -S(-ln 1.5) = ln(1 + 1.5)
}
