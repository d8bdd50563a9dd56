"""Losses of pairs: golden values, values at the reference, shifts, equivalences, gradients, extremes, NumPy."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.config.train import PAIR_LOSSES, READS
from prefpipe.stages.train.losses import pairwise
from prefpipe.stages.train.losses.batch import Logps, LossSettings, PairBatch
from prefpipe.stages.train.losses.registry import LOSSES, combine
from tests.stages.train.cases import AT_REFERENCE, LN2, A, B, C, D, Recorder, Row, beta, pairs

LOGP = st.floats(-2000, 0, width=32)
ROW = st.tuples(LOGP, LOGP, LOGP, LOGP, st.integers(1, 1000), st.integers(1, 1000))
ROWS = st.lists(ROW, min_size=1, max_size=6)
BETA = st.floats(0.01, 10)
WITH_REFERENCE = [name for name in PAIR_LOSSES if LOSSES[name].needs_reference]


def loss(name: str, s: LossSettings, *rows: Row, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    if name == "exo_pair" and not s.label_smoothing:
        s = replace(s, label_smoothing=1e-3)
    return LOSSES[name].fn(pairs(*rows, dtype=dtype, prob=0.8, gap=1.5), s)


GOLDEN: dict[str, tuple[str, LossSettings, tuple[float, float, float, float]]] = {
    "dpo": ("sigmoid", beta(0.1), (0.403186, 0.403186, 1.701413, 0.634946)),
    "cdpo": ("sigmoid", beta(0.1, label_smoothing=0.1), (0.473186, 0.473186, 1.551413, 0.646946)),
    "robust": ("robust", beta(0.1, label_smoothing=0.1), (0.315686, 0.315686, 1.888913, 0.619946)),
    "hinge": ("hinge", beta(0.1), (0.3, 0.3, 2.5, 0.88)),
    "ipo_sum": ("ipo", beta(0.1), (4.0, 4.0, 400.0, 14.44)),
    "ipo_mean": ("ipo", beta(0.1, ipo_reduction="mean"), (22.09, 22.5625, 25.173913, 18.49)),
    "dpo_norm": ("sigmoid_norm", beta(5.0), (0.201413, 0.251929, 0.737492, 0.029750)),
    "exo": ("exo_pair", beta(0.1, label_smoothing=1e-3), (1.657292, 1.657292, 5.172735, 2.556073)),
    "nca": ("nca_pair", beta(0.1), (1.234247, 1.288164, 1.956931, 1.356994)),
    "bco": ("bco_pair", beta(0.1), (1.072216, 1.167617, 2.287339, 1.327594)),
    "apo_zero": ("apo_zero", beta(0.1), (0.827707, 0.843384, 1.353518, 0.970021)),
    "apo_down": ("apo_down", beta(0.1), (0.881646, 0.757370, 1.086516, 0.975036)),
    "sppo_hard": ("sppo_hard", beta(0.1), (9.0, 89.0, 325.0, 39.04)),
    "dpop": ("dpop", beta(0.1), (0.403186, 14.300001, 51.5, 0.634946)),
    "dpo+nll": ("sigmoid+nll", beta(0.1), (2.403186, 2.653186, 3.923636, 1.134946)),
    "simpo": ("simpo", beta(2.0, simpo_gamma=1.0), (1.037488, 1.103186, 1.272953, 0.313262)),
    "cpo+nll": ("cpo+nll", beta(0.1), (2.201413, 2.451413, 22.222222, 1.075939)),
    "orpo": ("orpo", beta(0.1), (2.058564, 2.311346, 2.289994, 0.517086)),
    "alphapo": ("alphapo", beta(2.5, simpo_gamma=0.1), (0.388376, 0.447990, 0.682476, 0.043276)),
    "rdpo": ("rdpo", beta(0.1), (0.420055, 0.420055, 0.974077, 0.639659)),
    "rainbow": ("rainbow", beta(10.0), (0.201413, 0.313262, 1.027873, 0.000203)),
}  # KTO's, the twenty-second, are in test_unpaired


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_values(case: str):
    """Computed in float64 by a separate script from the papers' formulas; six decimals."""
    names, s, expected = GOLDEN[case]
    both = names.split("+")
    found = combine(both, [1.0] * len(both), pairs(A, B, C, D), s)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    single = combine(both, [1.0] * len(both), pairs(A, B, C, D, dtype=torch.float32), s)
    assert single.tolist() == pytest.approx(expected, rel=1e-5, abs=2e-6)


@pytest.mark.parametrize(("row", "h"), [(A, 7.0), (C, -15.0), (D, 1.2)])
def test_dpo_values_derived_by_hand(row: Row, h: float):
    """h = (c - c0) - (r - r0): A 2 + 5 = 7, C -10 - 5 = -15, D 0.2 + 1 = 1.2; the loss is ln(1 + e^(-0.1 h))."""
    assert float(loss("sigmoid", beta(0.1), row)) == pytest.approx(math.log(1 + math.exp(-0.1 * h)), rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(LOGP, LOGP, st.sampled_from(sorted(AT_REFERENCE)))
def test_values_where_the_policy_is_the_reference(c: float, r: float, name: str):
    s, expected = AT_REFERENCE[name]
    assert float(loss(name, s, (c, r, c, r, 5, 15))) == pytest.approx(expected, rel=1e-12)


def test_every_loss_with_a_reference_has_a_value_there():
    """Rainbow alone depends on the policy itself at that point."""
    assert set(AT_REFERENCE) == set(WITH_REFERENCE) - {"rainbow"}


SHIFT_BLIND = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "margin", "odpo", "soft", "rdpo")
SHIFT_AWARE = ("nca_pair", "bco_pair", "apo_zero", "apo_down", "dpop", "sppo_hard", "sppo")


@settings(deadline=None, max_examples=40)
@given(ROWS, st.floats(-500, 500, width=32), st.sampled_from(SHIFT_BLIND))
def test_losses_of_h_are_blind_to_a_shift_of_both_sides(rows: list[Row], shift: float, name: str):
    """The same k added to a and b leaves h as it is."""
    moved = [(c + shift, r + shift, *rest) for c, r, *rest in rows]
    s = beta(0.1, label_smoothing=0.01)
    torch.testing.assert_close(loss(name, s, *moved), loss(name, s, *rows), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", SHIFT_AWARE)
def test_losses_with_an_anchor_see_a_shift_of_both_sides(name: str):
    moved = (A[0] - 6, A[1] - 6, *A[2:])
    assert abs(float(loss(name, beta(0.1), moved) - loss(name, beta(0.1), A))) > 1e-2


@settings(deadline=None, max_examples=40)
@given(ROWS, BETA)
def test_swapping_the_sides_adds_beta_h(rows: list[Row], b: float):
    """With x = beta h: -S(-x) + S(x) = log(s(x) / s(-x)) = log(e^x) = x, for S = log s and s the sigmoid."""
    swapped = [(r, c, r0, c0, length, w) for c, r, c0, r0, w, length in rows]
    h = torch.tensor([(c - c0) - (r - r0) for c, r, c0, r0, _, _ in rows], dtype=torch.float64)
    difference = loss("sigmoid", beta(b), *swapped) - loss("sigmoid", beta(b), *rows)
    torch.testing.assert_close(difference, b * h, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(ROWS, BETA)
def test_special_cases_are_the_losses_they_generalise(rows: list[Row], b: float):
    """cDPO(0) = robust(0) = DPO; soft(1) = DPO; LD(1) = DPO; Rainbow(m=1) = DPO-norm, Rainbow(m=0) = SimPO with
    gamma = beta g; SimPO(gamma=0) = DPO-norm with a reference of zeros; margin and ODPO with alpha 0 are DPO."""
    given = pairs(*rows, prob=1.0, gap=2.0)
    dpo, norm = (LOSSES[name].fn(given, beta(b)) for name in ("sigmoid", "sigmoid_norm"))
    same: list[tuple[torch.Tensor, torch.Tensor]] = [
        (pairwise.robust(given, beta(b)), dpo),
        (pairwise.soft(given, beta(b)), dpo),
        (pairwise.sigmoid(given, beta(b, ld_alpha=1.0)), dpo),
        (pairwise.margin(given, beta(b, margin_alpha=0.0)), dpo),
        (pairwise.odpo(given, beta(b, margin_alpha=0.0)), dpo),
        (pairwise.rdpo(given, beta(b, rdpo_alpha=0.0)), dpo),
        (pairwise.dpop(given, beta(b, dpop_lambda=0.0)), dpo),
        (pairwise.rainbow(given, beta(b, rainbow_mix=1.0)), norm),
        (
            pairwise.rainbow(given, beta(b, rainbow_mix=0.0, rainbow_margin=0.3)),
            pairwise.simpo(given, beta(b, simpo_gamma=0.3 * b)),
        ),
        (
            pairwise.simpo(given, beta(b, simpo_gamma_beta_ratio=0.0)),
            pairwise.sigmoid_norm(pairs(*((c, r, 0.0, 0.0, w, n) for c, r, _, _, w, n in rows)), beta(b)),
        ),
    ]
    for one, other in same:
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_two_names_of_simpos_margin_agree():
    """gamma 1 at beta 2 is a ratio of 0.5; gamma wins where it is given."""
    assert pairwise.gamma(beta(2.0, simpo_gamma_beta_ratio=0.5)) == 1.0
    assert pairwise.gamma(beta(2.0, simpo_gamma=1.0, simpo_gamma_beta_ratio=7.0)) == 1.0


def test_ld_weighs_the_tail_of_policy_and_reference_alike():
    """Prefixes are half of the sums here, so alpha 0 halves h: A 3.5, and alpha 0.5 gives 5.25."""
    for alpha, h in ((0.0, 3.5), (0.5, 5.25), (1.0, 7.0)):
        found = float(pairwise.sigmoid(pairs(A), beta(0.1, ld_alpha=alpha)))
        assert found == pytest.approx(math.log1p(math.exp(-0.1 * h)), rel=1e-12)
    at_reference = float(pairwise.sigmoid(pairs((-3.0, -9.0, -3.0, -9.0, 2, 7)), beta(0.1, ld_alpha=0.3)))
    assert at_reference == pytest.approx(LN2, rel=1e-12)
    bare = PairBatch(*(Logps(torch.ones(1), torch.ones(1), torch.ones(1)) for _ in range(2)))
    with pytest.raises(ValueError, match="ld_alpha"):
        pairwise.sigmoid(bare, beta(0.1, ld_alpha=0.5))


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_loss_reads_the_settings_that_its_config_says(name: str):
    """Else a setting would do nothing, or be refused although it does something."""
    watched = [Recorder(beta(0.1, label_smoothing=0.1)), Recorder(beta(0.1, label_smoothing=0.1, ld_alpha=0.5))]
    for recorder in watched:
        LOSSES[name].fn(pairs(A, prob=0.8, gap=2.0), recorder)
    known = {f.name for f in fields(LossSettings)}
    assert set.union(*(r.read for r in watched)) == set(READS[name]) & known | (
        {"simpo_gamma", "simpo_gamma_beta_ratio"} & set(READS[name])
    )


def gradient(name: str, s: LossSettings, row: Row, dtype: torch.dtype = torch.float64) -> list[float]:
    c, r = (torch.tensor([v], dtype=dtype, requires_grad=True) for v in row[:2])
    given = pairs(row, dtype=dtype, prob=0.8, gap=1.5)
    half = 0.5 if s.ld_alpha < 1 else None
    sides = [
        replace(side, policy=leaf, policy_prefix=None if half is None else leaf * half)
        for side, leaf in ((given.chosen, c), (given.rejected, r))
    ]
    LOSSES[name].fn(replace(given, chosen=sides[0], rejected=sides[1]), s).sum().backward()
    return [0.0 if t.grad is None else float(t.grad) for t in (c, r)]


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(*[st.floats(-30, -0.05)] * 4), st.floats(0.05, 1), st.sampled_from(PAIR_LOSSES),
    st.sampled_from([1.0, 0.4]),
)  # fmt: skip
def test_gradients_equal_finite_differences(row: Row, b: float, name: str, ld: float):
    """Central differences in float64: error O(step^2), below 1e-6 relative; not at the kinks of hinge and DPOP."""
    s, step = beta(b, label_smoothing=0.05, ld_alpha=ld if "ld_alpha" in READS[name] else 1.0), 1e-4
    full = (*row, 7.0, 9.0)
    a, h = row[0] - row[2], (row[0] - row[2]) - (row[1] - row[3])
    if abs(a) < 1e-3 or abs(b * h * (1 + ld) / 2 - 1) < 1e-3:
        return
    for position, value in enumerate(gradient(name, s, full)):
        up, down = list(full), list(full)
        up[position] += step
        down[position] -= step
        values = [float(loss(name, s, tuple(r))) for r in (up, down)]
        assert value == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-6, abs=1e-9)


@pytest.mark.parametrize("row", [A, C, D])
def test_dpo_gradient_is_minus_beta_sigmoid_of_minus_beta_h(row: Row):
    """d/dc -S(beta h) = -beta s(-beta h) < 0 and the opposite for r: chosen goes up, rejected down, equally."""
    chosen, rejected = gradient("sigmoid", beta(0.1), row)
    h = (row[0] - row[2]) - (row[1] - row[3])
    assert chosen == pytest.approx(-0.1 / (1 + math.exp(0.1 * h)), rel=1e-12)
    assert rejected == -chosen


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize(
    "row",
    [
        (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),  # both empty
        (0.0, -5.0, 0.0, -5.0, 0.0, 3.0),  # an empty chosen completion
        (-2000.0, -2000.0, -2000.0, -2000.0, 500.0, 500.0),
        C,
        (0.0, -1e-9, -0.5, -0.5, 1.0, 1.0),  # a certain token
        (-1.0, -2.0, -1.5, -1.5, 1.0, 1.0),  # one token each
        (-3.0, -3.0, -2.0, -2.0, 4.0, 4.0),  # the same completion twice
    ],
)
def test_extreme_rows_give_finite_losses_and_gradients(name: str, row: Row):
    for b in (1e-6, 0.1, 2.0, 1e3):
        s = beta(b, label_smoothing=1e-3, simpo_gamma=0.5)
        if name == "alphapo" and b == 1e3:
            continue  # its reward is exponential by construction
        found = float(loss(name, s, row, dtype=torch.float32))
        assert math.isfinite(found), (b, found)
        assert all(map(math.isfinite, gradient(name, s, row, torch.float32))), b


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_identical_sides_pull_equally_in_both_directions(name: str):
    """h = 0 whatever the policy: the gradients of one completion cancel. Losses with an anchor, and NLL, still pull."""
    same = (-3.0, -3.0, -2.5, -2.5, 4.0, 4.0)
    chosen, rejected = gradient(name, beta(0.1, label_smoothing=0.1), same)
    if name in {*SHIFT_AWARE, "nll", "orpo"} - {"apo_zero"}:  # s(-x) + s(x) = 1 for any x
        assert chosen + rejected != pytest.approx(0, abs=1e-6)
    else:
        assert chosen + rejected == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("b", [1e-6, 0.1, 10.0])
@pytest.mark.parametrize("h", [-1e4, -200.0, 0.0, 200.0, 1e4])
def test_dpo_at_extremes_tends_to_its_asymptotes(h: float, b: float):
    """Log-probs of -2000 with |beta h| up to 1e5: the loss tends to max(0, -beta h), its slope to 0 or -beta."""
    row = (-2000.0, -2000.0 - h, -2000.0, -2000.0, 500.0, 500.0)
    found, (chosen, _) = float(loss("sigmoid", beta(b), row, dtype=torch.float32)), gradient("sigmoid", beta(b), row)
    assert found == pytest.approx(float(np.logaddexp(0, -b * h)), rel=1e-5, abs=1e-30)
    if b * h <= -200:
        assert chosen == pytest.approx(-b)


def test_bfloat16_sums_would_lose_the_preference():
    """Why sums are float32: at 2000 nats bfloat16 has steps of 8, so that -2007.4 and -2004.1 are one number."""
    exact = loss("sigmoid", beta(0.1), (-2007.4, -2004.1, -2004.1, -2004.1, 1, 1), dtype=torch.float32)
    rounded = loss("sigmoid", beta(0.1), (-2007.4, -2004.1, -2004.1, -2004.1, 1, 1), dtype=torch.bfloat16)
    assert float(exact) == pytest.approx(math.log1p(math.exp(0.33)), rel=1e-4)
    assert float(rounded) == pytest.approx(LN2, abs=0.01)


@pytest.mark.parametrize("x", [-50.0, -2.0, -math.log(2), -0.5, -1e-3, -2e-6])
def test_log_odds_against_exact_arithmetic(x: float):
    """log(p / (1 - p)) = x - log(-expm1(x)), by NumPy's longdouble; the naive log(1 - exp) is off near 0."""
    expected = float(np.longdouble(x) - np.log(-np.expm1(np.longdouble(x))))
    assert float(pairwise.log_odds(torch.tensor(x, dtype=torch.float64))) == pytest.approx(expected, rel=1e-12)
    assert float(pairwise.log_odds(torch.tensor(x))) == pytest.approx(expected, rel=1e-5)


def test_log_odds_of_certainty_are_capped_with_a_finite_gradient():
    """Above -1e-6 the value is that of -1e-6, 13.8 nats; its gradient is 0 there, and never NaN."""
    x = torch.tensor([0.0, -1e-30, -1e-7, -1e-6], requires_grad=True)
    found = pairwise.log_odds(x)
    found.sum().backward()
    assert found.tolist() == pytest.approx([math.log(1e6)] * 4, rel=1e-5)
    assert torch.isfinite(x.grad).all()


def test_nll_is_the_mean_over_the_tokens_it_covers():
    """A: 40 nats over 20 tokens = 2; with a prompt of 10 nats and 5 tokens more, 50 over 25 = 2, D 0.5 and 0.8."""
    given = pairs(A, D)
    assert pairwise.nll(given, beta(0.1)).tolist() == [2.0, 0.5]
    wider = Logps(torch.tensor([-50.0, -4.0]).double(), torch.tensor([25.0, 5.0]).double())
    assert pairwise.nll(replace(given, nll=wider), beta(0.1)).tolist() == [2.0, 0.8]
    assert gradient("nll", beta(0.1), A) == [-1 / 20, 0.0]


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_loss_says_what_it_lacks(name: str):
    bare = PairBatch(*(Logps(torch.full((1,), v), torch.ones(1)) for v in (-1.0, -2.0)))
    spec = LOSSES[name]
    s = beta(0.1, label_smoothing=1e-3)
    if spec.needs_reference:
        with pytest.raises(ValueError, match="reference"):
            spec.fn(bare, s)
    else:
        assert torch.isfinite(spec.fn(bare, s)).all()
    for needed, column in ((spec.needs_preference_prob, "preference_prob"), (spec.needs_reward_gap, "reward_gap")):
        if needed:
            with pytest.raises(ValueError, match=column):
                spec.fn(pairs(A), s)


def numpy_dpo(rows: np.ndarray, b: float) -> np.ndarray:
    chosen, rejected, ref_chosen, ref_rejected, _, _ = rows.T
    return np.logaddexp(0, -b * ((chosen - ref_chosen) - (rejected - ref_rejected)))


def numpy_simpo(rows: np.ndarray, b: float) -> np.ndarray:
    chosen, rejected, _, _, w, length = rows.T
    return np.logaddexp(0, -(b * chosen / w - b * rejected / length - 0.5 * b))


def numpy_orpo(rows: np.ndarray, b: float) -> np.ndarray:
    chosen, rejected, _, _, w, length = rows.T.astype(np.longdouble)
    odds = [u - np.log(-np.expm1(u)) for u in (np.minimum(x / n, -1e-6) for x, n in ((chosen, w), (rejected, length)))]
    return -chosen / w + b * np.logaddexp(0, -(odds[0] - odds[1]))


@settings(deadline=None, max_examples=40)
@given(ROWS, BETA)
def test_parity_with_numpy(rows: list[Row], b: float):
    for name, oracle in (("sigmoid", numpy_dpo), ("simpo", numpy_simpo), ("orpo", numpy_orpo)):
        expected = oracle(np.array(rows, dtype=np.float64), b).astype(np.float64)
        np.testing.assert_allclose(loss(name, beta(b), *rows).numpy(), expected, rtol=1e-9, atol=1e-9)
