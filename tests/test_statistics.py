"""Intervals against published numbers and closed forms, tests of pairs against enumeration, and how often they hold."""

import itertools
import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe import statistics as s


@pytest.mark.parametrize(
    ("passed", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17:857, Table I, method 3
        (15, 148, 0.0624, 0.1605),  # the same table
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_published_intervals(passed: int, total: int, low: float, high: float) -> None:
    """0 of n by hand: the lower end is 0, the upper z^2 / (n + z^2) = 3.8415 / 13.8415 = 0.2775 for n = 10."""
    assert s.wilson([True] * passed + [False] * (total - passed)) == pytest.approx((low, high), abs=5e-5)


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_wilson_holds_the_share_and_solves_its_equation(passed: list[bool]) -> None:
    """The ends are the shares q at which (p - q)^2 = z^2 q (1 - q) / n."""
    z, n = 1.959964, len(passed)
    p = sum(passed) / n
    low, high = s.wilson(passed)
    assert 0 <= low <= p + 1e-12
    assert p - 1e-12 <= high <= 1
    for q in (low, high):
        assert (p - q) ** 2 == pytest.approx(z * z * q * (1 - q) / n, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 5))
def test_equal_answers_to_a_prompt_hold_no_more_news_than_one(passed: list[bool], copies: int) -> None:
    """The share of clusters of equal answers is Wilson's interval of the prompts."""
    found = s.share([[p] * copies for p in passed])
    assert found.value == pytest.approx(sum(passed) / len(passed))
    assert found[1:] == pytest.approx(s.wilson(passed))


def test_answers_that_differ_inside_prompts_count_as_many() -> None:
    """Prompts of one pass and one failure each: no spread between prompts, and their number is the safe choice."""
    assert s.share([[True, False]] * 20)[1:] == pytest.approx(s.wilson([True, False] * 10))
    source = random.Random(3)
    independent = [[source.random() < 0.5 for _ in range(4)] for _ in range(400)]
    width = s.share(independent).high - s.share(independent).low
    assert width == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(1600), rel=0.1)


def test_the_mean_by_hand() -> None:
    """Values 1, 2, 3, one to a prompt: standard error sqrt(1 / 3). Twice the same answers: the same interval."""
    half = 1.959964 / math.sqrt(3)
    for copies in (1, 2):
        assert s.mean([[v] * copies for v in (1.0, 2.0, 3.0)]) == pytest.approx((2, 2 - half, 2 + half))
    assert s.mean([[7.0, 9.0]]) == (8, 8, 8)


def test_a_ratio_by_hand() -> None:
    """Sums 2 and 6 over counts 1 and 1 are the mean 4; over counts 2 and 6 they are exactly 1."""
    assert s.ratio([2, 6], [1, 1]) == pytest.approx(s.mean([[2], [6]]))
    assert s.ratio([2, 6], [2, 6]) == (1, 1, 1)


def test_bootstrap_is_deterministic_and_near_the_normal_interval() -> None:
    """100 prompts with one answer each, half of them passed: the standard error is 0.05, so 0.5 -+ 0.098."""
    groups = [[True], [False]] * 50
    assert s.bootstrap(groups) == s.bootstrap(groups)
    assert s.bootstrap(groups) == pytest.approx((0.402, 0.598), abs=0.015)


def test_bootstrap_resamples_prompts_not_answers() -> None:
    """Ten equal answers to each prompt hold no more news than one: the interval is that of the prompts."""
    single = [[n % 2 == 0] for n in range(40)]
    repeated = [group * 10 for group in single]
    assert s.bootstrap(repeated) == s.bootstrap(single)
    independent = [[True]] * 200 + [[False]] * 200
    (low, high), (lowest, highest) = s.bootstrap(independent), s.bootstrap(single)
    assert high - low < 0.5 * (highest - lowest)


def test_bootstrap_of_one_outcome_is_a_point() -> None:
    assert s.bootstrap([[True, True]] * 7) == (1.0, 1.0)
    assert s.bootstrap([[False]]) == (0.0, 0.0)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=3), min_size=1, max_size=12))
def test_bootstrap_stays_among_the_rates(groups: list[list[bool]]) -> None:
    low, high = s.bootstrap(groups)
    rates = [sum(g) / len(g) for g in groups]
    assert min(rates) <= low <= high <= max(rates)


def test_the_paired_difference_is_that_of_agresti_and_min() -> None:
    """b = 8 wins, c = 2 losses, n = 20, by their formula with 1/2 more in each of four cells:
    (b - c) / (n + 2) -+ z sqrt((b + c + 1) - (b - c)^2 / (n + 2)) / (n + 2)."""
    half = 1.959964 * math.sqrt(11 - 36 / 22) / 22
    assert s.paired([1] * 8 + [-1] * 2 + [0] * 10) == pytest.approx((0.3, 6 / 22 - half, 6 / 22 + half))


def test_the_win_rate_counts_half_of_a_tie() -> None:
    found = s.win_rate([1] * 8 + [-1] * 2 + [0] * 10)
    assert found.value == pytest.approx(0.65)
    assert 0.5 < found.low < 0.65 < found.high < 0.8
    everything = s.win_rate([1] * 10)
    assert (everything.value, everything.high) == (1, pytest.approx(1, abs=0.06))
    assert 0.7 < everything.low < 0.9


def enumerated(differences: Sequence[int]) -> float:
    """The share of all assignments of signs with a sum as far from 0."""
    sums = [abs(sum(signs)) for signs in itertools.product(*((d, -d) for d in differences))]
    return sum(total >= abs(sum(differences)) for total in sums) / len(sums)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_the_sign_flip_test_against_all_assignments(differences: list[int]) -> None:
    assert s.sign_flip_p(differences) == pytest.approx(enumerated(differences))


@pytest.mark.parametrize(("wins", "losses", "p"), [(5, 0, 0.0625), (8, 2, 112 / 1024), (1, 1, 1.0), (0, 0, 1.0)])
def test_mcnemar_by_hand(wins: int, losses: int, p: float) -> None:
    """Exact: twice the binomial tail. 8 of 10: 2 (1 + 10 + 45) / 1024. Ties change nothing."""
    assert s.sign_flip_p([1] * wins + [-1] * losses + [0] * 7) == pytest.approx(p)


def test_mcnemar_of_many_prompts_is_near_its_chi_square() -> None:
    """6000 wins, 5800 losses: z = (200 - 1) / sqrt(11800) with the continuity correction, p = erfc(z / sqrt 2)."""
    z = 199 / math.sqrt(11800)
    assert s.sign_flip_p([1] * 6000 + [-1] * 5800) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)


@settings(deadline=None)
@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(case: tuple[int, int, int]) -> None:
    total, passed, k = case
    subsets = list(itertools.combinations([True] * passed + [False] * (total - passed), k))
    assert s.pass_at_k(passed, total, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_kl_estimates_by_hand() -> None:
    """Log-ratios -0.5 and 0.25: k1 = 0.25, k3 = (e^-0.5 - 0.5) + (e^0.25 - 1.25)."""
    k1, k3 = s.kl_estimates([-1.0, -2.0], [-1.5, -1.75])
    assert (k1, k3) == pytest.approx((0.25, math.exp(-0.5) - 0.5 + math.exp(0.25) - 1.25))
    assert s.kl_estimates([-1.0], [-1.0]) == (0, 0)


def test_kl_estimates_are_unbiased_on_a_bandit() -> None:
    """Expected under the policy, both equal sum p log(p / q)."""
    p, q = (0.5, 0.3, 0.2), (0.2, 0.2, 0.6)
    exact = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    arms = [s.kl_estimates([math.log(a)], [math.log(b)]) for a, b in zip(p, q, strict=True)]
    for i in (0, 1):
        assert sum(a * arm[i] for a, arm in zip(p, arms, strict=True)) == pytest.approx(exact)
    assert all(k3 >= 0 for _, k3 in arms)
    assert any(k1 < 0 for k1, _ in arms)


def test_without_an_effect_of_length_the_fit_is_the_win_rate() -> None:
    """Equal lengths: the intercept is the log odds of (wins + ties / 2 + 1) / (n + 2), its interval that of Agresti and
    Min on the scale of log odds."""
    outcomes = [1.0] * 14 + [0.5] * 3 + [0.0] * 5
    found = s.length_controlled(outcomes, [7.0] * 22)
    p = (14 + 1.5 + 1) / 24
    assert found.intercept.value == pytest.approx(math.log(p / (1 - p)))
    paired = s.paired([2 * y - 1 for y in outcomes])
    half = (paired.high - paired.low) / 4 / (p * (1 - p))
    assert found.intercept.high - found.intercept.value == pytest.approx(half)
    assert found.win_rate.value == pytest.approx(p)
    assert found.slope == pytest.approx(0)


def drawn(source: random.Random, n: int, intercept: float, slope: float) -> tuple[list[float], list[float]]:
    """Verdicts of the model of the fit; ours are longer on average."""
    gaps = [source.gauss(80, 60) for _ in range(n)]
    middle = sum(gaps) / n
    spread = math.sqrt(sum((g - middle) ** 2 for g in gaps) / n)
    odds = [intercept + slope * math.tanh(g / spread) for g in gaps]
    return [float(source.random() < 1 / (1 + math.exp(-o))) for o in odds], gaps


def test_a_win_by_length_alone_is_none_at_equal_length() -> None:
    """A judge that likes long answers, and answers that are long: the win rate is high, the controlled one is 50 %
    inside its interval in 19 of 20 draws."""
    source, raw, inside = random.Random(5), 0.0, 0
    for _ in range(60):
        outcomes, gaps = drawn(source, 400, 0.0, 1.5)
        found = s.length_controlled(outcomes, gaps)
        raw += sum(outcomes) / len(outcomes) / 60
        inside += found.win_rate.low <= 0.5 <= found.win_rate.high
        assert found.slope > 0.5
    assert raw > 0.65
    assert inside >= 52


def test_the_fit_recovers_the_intercept() -> None:
    found = s.length_controlled(*drawn(random.Random(7), 6000, 0.8, -1.0))
    assert found.intercept.low < 0.8 < found.intercept.high
    assert found.intercept.value == pytest.approx(0.8, abs=0.15)
    assert found.slope == pytest.approx(-1.0, abs=0.2)


@pytest.mark.parametrize(
    ("outcomes", "gaps"),
    [
        ([1.0] * 9, [float(i) for i in range(9)]),  # every verdict agrees
        ([0.0] * 5 + [1.0] * 5, [-3.0] * 5 + [3.0] * 5),  # length decides every one
        ([1.0], [400.0]),
    ],
)
def test_the_fit_stays_finite_where_no_likelihood_has_a_maximum(outcomes: list[float], gaps: list[float]) -> None:
    found = s.length_controlled(outcomes, gaps)
    assert all(map(math.isfinite, (*found.intercept, *found.win_rate, found.slope)))
    assert 0 < found.win_rate.low < found.win_rate.value < found.win_rate.high < 1


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("prompts", [12, 80])
def test_two_runs_of_one_policy_are_even_in_two_hundred_seeds(prompts: int, samples: int) -> None:
    """An A/A comparison: prompts differ in how often the policy passes. The interval holds 50 %, and p is above 0.05,
    in about 95 of 100 seeds; the exact test never fires more often than 5 %."""
    inside = fired = controlled = 0
    for seed in range(200):
        source = random.Random(seed)
        rates = [source.random() for _ in range(prompts)]
        both = [[[source.random() < rate for _ in range(samples)] for _ in range(2)] for rate in rates]
        differences = [sum(ours) - sum(theirs) for ours, theirs in both]
        found = s.win_rate([d / samples for d in differences])
        inside += found.low <= 0.5 <= found.high
        fired += s.sign_flip_p(differences) < 0.05
        gaps = [source.gauss(0, 50) for _ in differences]
        fit = s.length_controlled([(1 + d / samples) / 2 for d in differences], gaps)
        controlled += fit.win_rate.low <= 0.5 <= fit.win_rate.high
    assert 182 <= inside <= 200, inside
    assert 182 <= controlled <= 200, controlled
    assert fired <= 18, fired


def test_a_better_policy_wins_outside_of_the_interval() -> None:
    source = random.Random(1)
    differences = [(source.random() < 0.7) - (source.random() < 0.4) for _ in range(200)]
    found = s.win_rate(differences)
    assert found.low > 0.5
    assert s.sign_flip_p(differences) < 1e-3


@pytest.mark.parametrize(
    ("p", "cell", "sentence"),
    [(0.0, "< 0.001", "< 0.001"), (9.99e-4, "< 0.001", "< 0.001"), (1e-3, "0.001", "= 0.001"),
     (0.0478, "0.048", "= 0.048"), (1.0, "1", "= 1")],
)  # fmt: skip
def test_a_p_value_is_never_shown_as_0(p: float, cell: str, sentence: str) -> None:
    assert (s.p_in_words(p), s.p_in_words(p, "= ")) == (cell, sentence)
