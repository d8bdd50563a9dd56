"""Function by function against TRL's own code on the same log-probs, and where we follow the paper instead.

TRL's loss methods run here as they are, on a stub of the trainer and a model that returns the given log-probs.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl")
from trl import DPOTrainer, KTOTrainer  # noqa: E402
from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402

from prefpipe.config.losses import LossSettings  # noqa: E402
from prefpipe.stages.train.losses import registry  # noqa: E402
from prefpipe.stages.train.losses.batch import LabelBatch, Logps, PairBatch  # noqa: E402
from tests.stages.train.cases import beta  # noqa: E402

CHOSEN = [[-1.0, -0.5, -2.0], [-0.25, -1.5, -0.75, -3.0, -0.1]]
REJECTED = [[-2.0, -1.0, -0.5, -1.25], [-0.9, -2.2]]
REF_CHOSEN, REF_REJECTED = [-4.1, -5.0], [-4.0, -3.6]
PROMPT = 2


class Fixed:
    """A model that gives these log-probs of the tokens after the prompt, padded on the right."""

    def __init__(self, rows: list[list[float]]) -> None:
        self.rows, width = rows, PROMPT - 1 + max(map(len, rows))
        self.logps = torch.tensor([[0.0] * (PROMPT - 1) + r + [0.0] * (width - PROMPT + 1 - len(r)) for r in rows])
        self.mask = torch.tensor([[0] * PROMPT + [1] * len(r) + [0] * (width - PROMPT + 1 - len(r)) for r in rows])

    def inputs(self) -> dict[str, torch.Tensor]:
        return {
            "input_ids": torch.ones_like(self.mask), "attention_mask": torch.ones_like(self.mask),
            "completion_mask": self.mask,
        }  # fmt: skip

    def __call__(self, **_: Any) -> SimpleNamespace:
        zero = torch.zeros_like(self.logps)
        return SimpleNamespace(log_probs=self.logps, entropy=zero, mean_logits=zero, is_top1=zero.bool())


class Accelerator:
    """One process."""

    device = torch.device("cpu")

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        return value

    gather_for_metrics = gather


def trainer(**settings: Any) -> SimpleNamespace:
    return SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=Accelerator(), aux_loss_enabled=False, _tp_size=1,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False, _total_train_tokens=0,
        _metrics={"train": defaultdict(list)}, loss_weights=[1.0], **settings,
    )  # fmt: skip


def trl_dpo(
    loss_type: str, s: LossSettings, refs: tuple[list[float], list[float]] = (REF_CHOSEN, REF_REJECTED)
) -> float:
    model = Fixed(CHOSEN + REJECTED)
    own = trainer(
        beta=s.beta, loss_types=[loss_type], label_smoothing=s.label_smoothing,
        ld_alpha=None if s.ld_alpha == 1 else s.ld_alpha,
    )  # fmt: skip
    references = {"ref_chosen_logps": torch.tensor(REF_CHOSEN), "ref_rejected_logps": torch.tensor(REF_REJECTED)}
    return float(DPOTrainer._compute_loss(own, model, {**model.inputs(), **references}, False))


def side(rows: list[list[float]], refs: list[float], shared: list[int], *, ref_prefix_is_sum: bool = False) -> Logps:
    sums = torch.tensor([sum(r) for r in rows])
    reference = torch.tensor(refs)
    return Logps(
        sums, torch.tensor([float(len(r)) for r in rows]), reference,
        torch.tensor([sum(r[:n]) for r, n in zip(rows, shared, strict=True)]),
        reference if ref_prefix_is_sum else torch.zeros(len(rows)),
    )  # fmt: skip


def ours(name: str, s: LossSettings) -> float:
    shared = [min(len(c), len(r)) for c, r in zip(CHOSEN, REJECTED, strict=True)]
    # TRL takes precomputed sums as they are: in its LD-DPO they already are the weighted ones.
    batch = PairBatch(
        side(CHOSEN, REF_CHOSEN, shared, ref_prefix_is_sum=True),
        side(REJECTED, REF_REJECTED, shared, ref_prefix_is_sum=True),
    )
    return float(registry.loss(name, batch, s).mean())


@pytest.mark.parametrize(
    ("name", "s", "golden"),
    [
        ("sigmoid", beta(0.1), 0.6887913),
        ("hinge", beta(0.1), 0.9875),
        ("ipo", beta(0.1, ipo_reduction="mean"), 25.0560284),
        ("sigmoid_norm", beta(0.1), 0.6928891),
        ("robust", beta(0.1, label_smoothing=0.1), 0.6872287),
        ("exo_pair", beta(0.1, label_smoothing=1e-3), 2.7416196),
        ("nca_pair", beta(0.1), 1.3840981),
        ("bco_pair", beta(0.1), 1.3810019),
        ("sppo_hard", beta(0.1), 49.5162506),
        ("apo_zero", beta(0.1), 0.9968780),
        ("apo_down", beta(0.1), 0.9968867),
        ("sigmoid", beta(0.1, ld_alpha=0.5), 0.6551509),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_losses_of_pairs_equal_trl(name: str, s: LossSettings, golden: float):
    """Both against TRL's code and against the values that TRL 1.16 gave when they were written down."""
    found = trl_dpo(name, s)
    assert found == pytest.approx(golden, abs=2e-6)
    assert ours(name, s) == pytest.approx(found, rel=1e-6, abs=1e-6)


def test_conservative_dpo_is_where_we_follow_the_paper():
    """TRL's sigmoid ignores label_smoothing without a word; ours is cDPO: the loss rises by e times beta h."""
    smoothed = beta(0.1, label_smoothing=0.1)
    assert trl_dpo("sigmoid", smoothed) == trl_dpo("sigmoid", beta(0.1))
    h = [(sum(c) - a) - (sum(r) - b) for c, r, a, b in zip(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, strict=True)]
    expected = trl_dpo("sigmoid", beta(0.1)) + 0.1 * 0.1 * sum(h) / 2
    assert ours("sigmoid", smoothed) == pytest.approx(expected, rel=1e-6)


def test_nll_is_a_mean_over_sequences_where_trl_has_one_over_tokens():
    """Lengths 3 and 5: TRL's sft gives every token 1/8, so that a long answer counts more; ours 1/2 each."""
    tokens = [v for row in CHOSEN for v in row]
    assert trl_dpo("sft", beta(0.1)) == pytest.approx(-sum(tokens) / 8, rel=1e-6)
    assert ours("nll", beta(0.1)) == pytest.approx(-(sum(CHOSEN[0]) / 3 + sum(CHOSEN[1]) / 5) / 2, rel=1e-6)


LABELS = [True, True, False, False]
REF_KL = [-4.6, -6.6, -5.75, -4.1]


def trl_kto(loss_type: str, s: LossSettings) -> tuple[float, float]:
    model = Fixed(CHOSEN + REJECTED)
    own = trainer(
        beta=s.beta, loss_type=loss_type, calculate_KL=loss_type == "kto", desirable_weight=s.desirable_weight,
        undesirable_weight=s.undesirable_weight,
    )  # fmt: skip
    own._compute_kl_logps = lambda *_: model.logps.sum(-1)
    inputs = {
        **model.inputs(), "label": torch.tensor(LABELS), "ref_logps": torch.tensor(REF_CHOSEN + REF_REJECTED),
        "ref_KL_logps": torch.tensor(REF_KL),
    }  # fmt: skip
    loss = KTOTrainer._compute_loss(own, model, inputs, False)
    return float(loss), own._metrics["train"]["kl"][0]


@pytest.mark.parametrize(
    ("name", "s", "golden"),
    [
        ("kto", beta(0.1), 0.4984446),
        ("kto", beta(0.1, desirable_weight=1.33), 0.5851653),
        ("apo_zero_unpaired", beta(0.1), 0.4984390),
    ],
)
def test_losses_of_labels_equal_trl_at_its_reference_point(name: str, s: LossSettings, golden: float):
    found, kl = trl_kto(name, s)
    assert found == pytest.approx(golden, abs=2e-6)
    policy = torch.tensor([sum(r) for r in CHOSEN + REJECTED])
    reference = torch.tensor(REF_CHOSEN + REF_REJECTED)
    batch = LabelBatch(Logps(policy, torch.ones(4), reference), torch.tensor(LABELS), torch.tensor(kl))
    assert float(registry.loss(name, batch, s).mean()) == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "loss_type", "s", "golden"),
    [
        ("cpo", "sigmoid", beta(0.1), 0.7292693),
        ("simpo", "simpo", beta(2.0, simpo_gamma=1.0), 1.0242839),
        ("simpo", "simpo", beta(2.5, simpo_gamma=1.375), 1.2067082),
        ("simpo", "simpo", beta(2.0, simpo_gamma=1.0, label_smoothing=0.1), None),
        ("alphapo", "simpo", beta(2.5, simpo_gamma=1.375), 1.0884247),
    ],
)
def test_reference_free_losses_equal_trl(name: str, loss_type: str, s: LossSettings, golden: float | None):
    own = SimpleNamespace(
        accelerator=Accelerator(), beta=s.beta, loss_type=loss_type, simpo_gamma=s.simpo_gamma,
        label_smoothing=s.label_smoothing, alpha=s.alphapo_alpha if name == "alphapo" else 0.0,
    )  # fmt: skip
    taken = [
        torch.tensor([sum(r) / (len(r) if loss_type == "simpo" else 1) for r in rows]) for rows in (CHOSEN, REJECTED)
    ]
    found = float(CPOTrainer.cpo_loss(own, *taken)[0].mean())
    assert ours(name, s) == pytest.approx(found, rel=1e-6)
    if golden is not None:
        assert found == pytest.approx(golden, abs=2e-6)


def test_the_odds_ratio_equals_trl():
    own = SimpleNamespace(accelerator=Accelerator(), beta=0.1)
    means = [torch.tensor([sum(r) / len(r) for r in rows]) for rows in (CHOSEN, REJECTED)]
    found = -float(ORPOTrainer.odds_ratio_loss(own, *means)[0].mean())
    assert found == pytest.approx(0.0560272, abs=2e-6)
    assert ours("orpo", beta(0.1)) - ours("nll", beta(0.1)) == pytest.approx(found, rel=1e-5)
