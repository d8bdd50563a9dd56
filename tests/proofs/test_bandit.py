"""Exact fixed points on a bandit: a policy of a few logits, the loss in expectation over all labels, and the answer on
paper. A wrong sign, a lost factor or a wrong side of a ratio moves the fixed point far beyond these tolerances.

Completions are arms of one token; s is the sigmoid; P(i > j) = s(r_i - r_j) unless a test says otherwise.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch

from prefpipe.config.losses import LossSettings
from prefpipe.stages.train.losses import registry
from prefpipe.stages.train.losses.batch import LabelBatch, Logps, PairBatch, RankBatch
from tests.stages.train.cases import beta

REF = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
REWARD = torch.tensor([0.0, 1.0, 0.5, -1.0], dtype=torch.float64)
UNIFORM = torch.tensor([0.5, 0.5], dtype=torch.float64)

Objective = Callable[[torch.Tensor], torch.Tensor]


def minimise(objective: Objective, start: torch.Tensor) -> torch.Tensor:
    """L-BFGS in float64 from `start` to the end; `objective` takes the free values."""
    values = start.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [values], max_iter=2000, tolerance_grad=1e-13, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = objective(values)
        loss.backward()
        return loss

    for _ in range(3):
        solver.step(closure)  # type: ignore[no-untyped-call]  (torch)
    return values.detach()


def preferences(reward: torch.Tensor = REWARD) -> torch.Tensor:
    """P(i > j) [K, K] of Bradley and Terry."""
    return torch.sigmoid(reward[:, None] - reward[None, :])


def population(
    name: str, s: LossSettings, ref: torch.Tensor, prob: torch.Tensor, pair_weights: torch.Tensor | None = None
) -> Objective:  # fmt: skip
    """The loss of the policy with these logits in expectation over ordered pairs, i chosen with prob[i, j]."""
    i, j = (torch.tensor(side) for side in zip(*itertools.permutations(range(len(ref)), 2), strict=True))
    weights = prob[i, j] * (1.0 if pair_weights is None else pair_weights[i, j])
    one = torch.ones(len(i), dtype=torch.float64)

    def objective(logits: torch.Tensor) -> torch.Tensor:
        logps = logits.log_softmax(-1)
        batch = PairBatch(*(Logps(logps[arm], one, ref.log()[arm]) for arm in (i, j)), preference_prob=prob[i, j])
        return (weights * registry.loss(name, batch, s)).sum()

    return objective


def solve(name: str, s: LossSettings, ref: torch.Tensor, prob: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
    return minimise(population(name, s, ref, prob, **others), ref.log()).softmax(-1)


def tv(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().sum() / 2)


def tilted(b: float, ref: torch.Tensor = REF, reward: torch.Tensor = REWARD) -> torch.Tensor:
    """pi* ~ ref exp(r / beta), the optimum of E[r] - beta KL."""
    return (ref.log() + reward / b).softmax(-1)


def two_arms(p: float) -> torch.Tensor:
    return torch.tensor([[0.5, p], [1 - p, 0.5]], dtype=torch.float64)


def log_ratio(policy: torch.Tensor, ref: torch.Tensor = UNIFORM) -> float:
    """h between the first arm and the second."""
    ratio = (policy / ref).log()
    return float(ratio[0] - ratio[1])


@pytest.mark.parametrize("b", [0.1, 0.5, 1.0])
def test_dpo_finds_the_tilted_reference(b: float):
    """d/dh of -p S(beta h) - (1-p) S(-beta h) is beta (s(beta h) - p): beta h = logit p = r_i - r_j for every pair."""
    assert tv(solve("sigmoid", beta(b), REF, preferences()), tilted(b)) < 1e-6


def test_dpo_does_not_care_which_pairs_are_frequent():
    weights = torch.tensor([[0, 9, 1, 2], [9, 0, 5, 0.1], [1, 5, 0, 3], [2, 0.1, 3, 0]], dtype=torch.float64)
    assert tv(solve("sigmoid", beta(0.5), REF, preferences(), pair_weights=weights), tilted(0.5)) < 1e-6


def test_soft_labels_need_each_pair_once():
    """With P(i > j) in the loss the order of the sides does not matter: every ordered pair with weight one half."""
    half = torch.full((4, 4), 0.5, dtype=torch.float64)
    i, j = (torch.tensor(side) for side in zip(*itertools.permutations(range(4), 2), strict=True))
    one = torch.ones(len(i), dtype=torch.float64)

    def objective(logits: torch.Tensor) -> torch.Tensor:
        logps = logits.log_softmax(-1)
        sides = (Logps(logps[arm], one, REF.log()[arm]) for arm in (i, j))
        batch = PairBatch(*sides, preference_prob=preferences()[i, j])
        return (half[i, j] * registry.loss("soft", batch, beta(0.5))).sum()

    assert tv(minimise(objective, REF.log()).softmax(-1), tilted(0.5)) < 1e-6


def test_robust_dpo_undoes_a_known_rate_of_flips_and_plain_dpo_does_not():
    e = 0.1
    flipped = (1 - e) * preferences() + e * (1 - preferences())
    assert tv(solve("robust", beta(0.5, label_smoothing=e), REF, flipped), tilted(0.5)) < 1e-6
    assert tv(solve("sigmoid", beta(0.5), REF, flipped), tilted(0.5)) > 0.05


@pytest.mark.parametrize(("p", "e", "expected"), [(0.8, 0.1, 10.460), (1.0, 0.1, 21.972)])
def test_conservative_dpo_stops_at_the_smoothed_label(p: float, e: float, expected: float):
    """beta h = logit((1-e) p + e (1-p)); finite for p = 1, where DPO has no fixed point."""
    h = log_ratio(solve("sigmoid", beta(0.1, label_smoothing=e), UNIFORM, two_arms(p)))
    q = (1 - e) * p + e * (1 - p)
    assert h == pytest.approx(math.log(q / (1 - q)) / 0.1, abs=1e-4)
    assert h == pytest.approx(expected, abs=1e-3)


def test_exo_stops_at_its_smoothed_label():
    """Deterministic labels, e = 1e-3: beta h = logit(1 - e) = 6.907."""
    h = log_ratio(solve("exo_pair", beta(1.0, label_smoothing=1e-3), UNIFORM, two_arms(1.0)))
    assert h == pytest.approx(math.log(0.999 / 0.001), abs=1e-4)


@pytest.mark.parametrize(("p", "tau", "h"), [(0.8, 0.1, 3.0), (1.0, 0.1, 5.0), (0.6, 0.5, 0.2)])
def test_ipo_of_two_arms(p: float, tau: float, h: float):
    """p (h - k)^2 + (1-p) (h + k)^2 with k = 1/(2 tau) is least at h = (p - 1/2) / tau."""
    found = log_ratio(solve("ipo", beta(tau), UNIFORM, two_arms(p)))
    assert found == pytest.approx(h, abs=1e-6)


def test_ipo_of_many_arms_is_a_step_of_multiplicative_weights():
    """Pairs i, j ~ ref: additive least squares give log(pi/ref)_i = const + P(i > ref) / tau."""
    tau, prob = 0.5, preferences()
    expected = (REF.log() + (prob @ REF) / tau).softmax(-1)
    found = solve("ipo", beta(tau), REF, prob, pair_weights=REF[:, None] * REF[None, :])
    assert tv(found, expected) < 1e-6
    assert found.tolist() == pytest.approx([0.3362, 0.3960, 0.2114, 0.0564], abs=1e-4)


@pytest.mark.parametrize(("g", "expected"), [(0.0, 1.3863), (0.5, 1.7323), (1.0, 2.1540), (2.0, 3.1067)])
def test_simpo_of_two_arms(g: float, expected: float):
    """x = beta log(pi_a / pi_b) solves p s(g - x) = (1-p) s(g + x), whatever the reference is."""
    s = beta(2.0, simpo_gamma=g, simpo_gamma_beta_ratio=0.0)
    ratio, q = 0.8 / 0.2, math.exp(-g)
    x = math.log(((ratio - 1) + math.sqrt((ratio - 1) ** 2 + 4 * ratio * q * q)) / (2 * q))
    for ref in (UNIFORM, torch.tensor([0.9, 0.1], dtype=torch.float64)):
        policy = solve("simpo", s, ref, two_arms(0.8))
        assert 2.0 * log_ratio(policy) == pytest.approx(x, abs=1e-6)
        assert x == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("weight", "expected"), [(1e-9, 0.8), (0.1, 0.7755), (0.5, 0.7254), (1.0, 0.7030), (10.0, 0.6712)]
)
def test_orpo_of_two_arms_is_less_confident_than_its_data(weight: float, expected: float):
    """z = logit pi_a: s(z) - p + 2 lambda (s(2z) - p) = 0, between p (NLL alone) and s(logit(p) / 2)."""
    policy = solve("orpo", beta(weight), UNIFORM, two_arms(0.8))
    z = log_ratio(policy)
    s = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    assert s(z) - 0.8 + 2 * weight * (s(2 * z) - 0.8) == pytest.approx(0, abs=1e-6)
    assert float(policy[0]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("nca_pair", math.log(1.6)), ("bco_pair", math.log(4.0))],
)
def test_anchored_losses_fix_each_log_ratio_alone(name: str, expected: float):
    """Free log-ratios a of two arms, each chosen with probability p against the other: NCA has beta a = log 2p, BCO
    beta a = logit p. A loss of h alone would leave their sum open."""
    one, p = torch.ones(2, dtype=torch.float64), torch.tensor([0.8, 0.2], dtype=torch.float64)

    def objective(a: torch.Tensor) -> torch.Tensor:
        batch = PairBatch(Logps(a, one, 0 * one), Logps(a.flip(0), one, 0 * one))
        return (p * registry.loss(name, batch, beta(0.5))).sum()

    found = 0.5 * minimise(objective, torch.zeros(2, dtype=torch.float64))
    assert float(found[0]) == pytest.approx(expected, abs=1e-5)


def test_sppo_fixes_each_log_ratio_at_its_share():
    """Soft P = 0.8 both ways: a = (P - 1/2) / beta = 0.6 at beta 0.5, and the other arm -0.6."""
    one, p = torch.ones(2, dtype=torch.float64), torch.tensor([0.8, 0.2], dtype=torch.float64)

    def objective(a: torch.Tensor) -> torch.Tensor:
        batch = PairBatch(Logps(a, one, 0 * one), Logps(a.flip(0), one, 0 * one), preference_prob=p)
        return registry.loss("sppo", batch, beta(0.5)).sum()

    assert minimise(objective, torch.zeros(2, dtype=torch.float64)).tolist() == pytest.approx([0.6, -0.6], abs=1e-8)


def test_plackett_luce_over_whole_rankings_finds_the_tilted_reference():
    """All 24 orders of four arms with their Plackett-Luce probabilities under r."""
    orders = torch.tensor(list(itertools.permutations(range(4))))
    scores = REWARD[orders]
    rest = scores.flip(-1).logcumsumexp(-1).flip(-1)
    weights = (scores - rest).sum(-1).exp()
    assert float(weights.sum()) == pytest.approx(1.0)
    present, one = torch.ones_like(orders).bool(), torch.ones_like(scores)

    def objective(logits: torch.Tensor) -> torch.Tensor:
        batch = RankBatch(Logps(logits.log_softmax(-1)[orders], one, REF.log()[orders]), present)
        return (weights * registry.loss("plackett_luce", batch, beta(0.5))).sum()

    assert tv(minimise(objective, REF.log()).softmax(-1), tilted(0.5)) < 1e-6


def kto_policy(s: LossSettings, q: Sequence[float], steps: int = 500) -> torch.Tensor:
    """Gradient descent on KTO with rows y ~ ref, desirable with probability q(y), and the exact KL as z0."""
    chance = torch.tensor([*q, *[1 - v for v in q]], dtype=torch.float64)
    weights, desirable = REF.repeat(2) * chance, torch.tensor([True] * 4 + [False] * 4)
    logits = REF.log().clone().requires_grad_()
    adam = torch.optim.Adam([logits], lr=0.3)
    for _ in range(steps):
        logps = logits.log_softmax(-1)
        z0 = (logps.exp() * (logps - REF.log())).sum().detach()
        rows = Logps(logps.repeat(2), torch.ones(8, dtype=torch.float64), REF.log().repeat(2))
        loss = (weights * registry.loss("kto", LabelBatch(rows, desirable, z0), s)).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return logits.detach().softmax(-1)


def test_kto_keeps_the_arms_that_are_good_more_often_than_not():
    """Small beta: pi ~ ref [lambda_D q - lambda_U (1-q)]_+, (0.8421, 0.1579, 0, 0) here. It is no tilted reference."""
    q = (0.9, 0.6, 0.3, 0.1)
    predicted = REF * torch.tensor([max(0.0, 2 * v - 1) for v in q], dtype=torch.float64)
    predicted = predicted / predicted.sum()
    assert predicted.tolist() == pytest.approx([0.8421, 0.1579, 0, 0], abs=1e-4)
    assert tv(kto_policy(beta(0.1), q), predicted) < 2e-3


def test_the_weight_of_undesirable_rows_moves_the_threshold():
    """lambda_U = 3 keeps arms with q > 3/4: the first alone."""
    found = kto_policy(beta(0.1, undesirable_weight=3.0), (0.9, 0.6, 0.3, 0.1))
    assert float(found[0]) > 0.995


def test_kto_with_clean_labels_is_the_reference_restricted_to_good_arms():
    found = kto_policy(beta(0.1), (1.0, 1.0, 0.0, 0.0))
    assert found.tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=3e-3)
