"""Estimates with 95 % intervals, and paired comparisons. Pure functions of numbers; a group is what one prompt gave.

Answers to one prompt are not independent, so every spread is that between prompts (clustered standard errors: Miller
2024, 2411.00640, section 2.2).
"""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Z = 1.959964  # of a 95 % interval
_RESAMPLES = 2000
_NEGLIGIBLE = 1e-18  # probability of an outcome that no p value shows
_STEPS, _CLOSE = 100, 1e-10  # of Newton's method
_LARGEST_EXPONENT = 700.0


class Estimate(NamedTuple):
    """A value with its 95 % interval. One prompt shows no spread: low and high are then the value."""

    value: float
    low: float
    high: float

    def named(self, name: str) -> dict[str, float]:
        """NAME, NAME_low and NAME_high, as totals have them."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}

    def alone(self, name: str) -> dict[str, float]:
        """NAME, low and high, for a table of one number."""
        return {name: self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class LengthControlled:
    """The verdict at equal length: the intercept of the fit (log odds), the win rate that it means, and the slope."""

    intercept: Estimate
    win_rate: Estimate
    slope: float


def wilson(passed: Sequence[bool], z: float = Z) -> tuple[float, float]:
    """Wilson score interval of a share (Wilson 1927), 95 % by default."""
    return wilson_of_share(sum(passed) / len(passed), len(passed), z)


def wilson_of_share(share: float, count: float, z: float = Z) -> tuple[float, float]:
    """As `wilson`, of a share of `count` answers."""
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (middle - half) / (1 + z * z / count)), min(1.0, (middle + half) / (1 + z * z / count))


def share(groups: Sequence[Sequence[float]]) -> Estimate:
    """A share of answers: the Wilson interval at the effective number of answers.

    That number is p (1 - p) / V, with V the variance of p between prompts (Korn and Graubard 1998), and the number of
    prompts where V is 0. With one answer to each prompt it is the number of answers: `wilson`. Values are 0 to 1.
    """
    counts = [len(group) for group in groups]
    p = sum(map(sum, groups)) / sum(counts)
    variance = sum((sum(g) - p * len(g)) ** 2 for g in groups) / sum(counts) ** 2
    effective = p * (1 - p) / variance if variance > 0 else float(len(groups))
    return Estimate(p, *wilson_of_share(p, min(effective, float(sum(counts)))))


def mean(groups: Sequence[Sequence[float]]) -> Estimate:
    """The mean over answers, with the normal interval by prompt (Miller 2024)."""
    return ratio([sum(group) for group in groups], [len(group) for group in groups])


def ratio(sums: Sequence[float], counts: Sequence[float]) -> Estimate:
    """Sum over all prompts / count over all prompts, with the normal interval of the linearised ratio: the residuals
    are sum - value * count (Cochran 1977, section 6.3)."""
    total, n = sum(counts), len(sums)
    value = sum(sums) / total
    squares = sum((s - value * c) ** 2 for s, c in zip(sums, counts, strict=True))
    half = Z * math.sqrt(squares * n / (n - 1)) / total if n > 1 else 0.0
    return Estimate(value, value - half, value + half)


def bootstrap(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95 % percentile interval of the mean over answers when whole prompts are resampled; deterministic."""
    source, places = random.Random(0), range(len(groups))
    total, count = [sum(group) for group in groups].__getitem__, list(map(len, groups)).__getitem__
    drawn = (source.choices(places, k=len(groups)) for _ in range(_RESAMPLES))
    rates = sorted(sum(map(total, d)) / sum(map(count, d)) for d in drawn)
    return rates[int(0.025 * _RESAMPLES)], rates[int(0.975 * _RESAMPLES) - 1]


def paired(differences: Sequence[float]) -> Estimate:
    """The mean of paired differences between -1 and 1, one for each prompt.

    The interval is Wald's after half a win, half a loss and one tie were added: for win, tie and loss that of Agresti
    and Min 2005 (Statistics in Medicine 24:729), which holds its level for few prompts and for no win or no loss.
    """
    n, total = len(differences) + 2, sum(differences)
    squares = math.fsum(d * d for d in differences) + 1
    middle, half = total / n, Z * math.sqrt(squares - total * total / n) / n
    return Estimate(total / (n - 2), max(-1.0, middle - half), min(1.0, middle + half))


def win_rate(outcomes: Sequence[float]) -> Estimate:
    """Wins and half the ties, as a share, from the mean outcome of each prompt: 1 for wins only, -1 for losses only."""
    return Estimate(*((1 + x) / 2 for x in paired(outcomes)))


def sign_flip_p(differences: Sequence[int]) -> float:
    """The two-sided p value of wins minus losses by prompt, when either side could have had each difference.

    With one comparison for each prompt it is the exact test of McNemar 1947: the binomial tail of wins among wins and
    losses. With several it is Fisher's randomisation test of paired differences, summed exactly.
    """
    outcomes = {0: 1.0}
    for size, count in Counter(abs(d) for d in differences if d).items():
        outcomes = _convolved(outcomes, _flips(size, count))
    observed = abs(sum(differences))
    return min(1.0, math.fsum(p for total, p in outcomes.items() if abs(total) >= observed))


def p_in_words(p: float, equals: str = "") -> str:
    """A p value for people: two digits, "< 0.001" below that. `equals` stands before the digits: "= " in a sentence."""
    return "< 0.001" if p < 0.001 else f"{equals}{p:.2g}"


def pass_at_k(passed: int, total: int, k: int) -> float:
    """The probability that one of k of the `total` answers passes: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021,
    2107.03374, eq. 1; unbiased)."""
    return 1 - math.comb(total - passed, k) / math.comb(total, k)


def kl_estimates(policy_logps: Sequence[float], other_logps: Sequence[float]) -> tuple[float, float]:
    """(k1, k3) of KL(policy, other) in nats, each summed over the tokens of a completion that the policy sampled.

    With log r = other - policy: k1 = -log r, k3 = r - 1 - log r (Schulman 2020, "Approximating KL divergence"). Both
    are unbiased for every token given those before it, so the sums are for the sequence; k3 is never negative.
    """
    logs = [other - policy for policy, other in zip(policy_logps, other_logps, strict=True)]
    return -math.fsum(logs), math.fsum(math.exp(min(x, _LARGEST_EXPONENT)) - 1 - x for x in logs)


def length_controlled(outcomes: Sequence[float], length_gaps: Sequence[float]) -> LengthControlled:
    """A logistic fit of the verdict on the difference of lengths, read at equal lengths (length-controlled AlpacaEval:
    Dubois et al. 2024, 2404.04475, section 3, for one pair of models and without its term for the prompt):

        logit P(win) = intercept + slope * tanh(gap / sd of gaps)

    outcomes: 1 win, 0.5 tie, 0 loss; length_gaps: characters, ours minus theirs; one of each for every prompt. At each
    of tanh = -1 and 1 stand a quarter of a win, a quarter of a loss and half a tie, as in `paired`: they keep the fit
    finite where all verdicts agree, and without an effect of length the interval is that of `win_rate`. The interval
    is the robust one (Huber 1967).
    """
    spread = _deviation(length_gaps)
    rows = [(y, math.tanh(g / spread) if spread else 0.0, 1.0) for y, g in zip(outcomes, length_gaps, strict=True)]
    rows += [(y, x, weight) for x in (-1.0, 1.0) for y, weight in ((1.0, 0.25), (0.0, 0.25), (0.5, 0.5))]
    a = b = 0.0
    for _ in range(_STEPS):
        (g0, g1), inverse = _gradient(rows, a, b)
        steps = inverse[0] * g0 + inverse[1] * g1, inverse[1] * g0 + inverse[2] * g1
        scale = min(1.0, 1 / max(map(abs, steps), default=1.0)) if any(steps) else 0.0
        a, b = a + scale * steps[0], b + scale * steps[1]
        if max(map(abs, steps)) < _CLOSE:
            break
    half = Z * math.sqrt(_intercept_variance(rows, a, b))
    ends = a, a - half, a + half
    return LengthControlled(Estimate(*ends), Estimate(*map(_sigmoid, ends)), b)


def _flips(size: int, count: int) -> dict[int, float]:
    """The distribution of the sum of `count` differences of one size with random signs."""
    logs = (math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(count + 1))
    odds = {size * (2 * k - count): math.exp(log - count * math.log(2)) for k, log in enumerate(logs)}
    return {total: p for total, p in odds.items() if p > _NEGLIGIBLE}


def _convolved(one: Mapping[int, float], other: Mapping[int, float]) -> dict[int, float]:
    sums: dict[int, float] = {}
    for x, p in one.items():
        for y, q in other.items():
            sums[x + y] = sums.get(x + y, 0.0) + p * q
    return {total: p for total, p in sums.items() if p > _NEGLIGIBLE}


def _deviation(values: Sequence[float]) -> float:
    middle = sum(values) / len(values)
    return math.sqrt(sum((v - middle) ** 2 for v in values) / len(values))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _gradient(
    rows: Sequence[tuple[float, float, float]], a: float, b: float
) -> tuple[tuple[float, float], tuple[float, float, float]]:
    """Gradient of the log-likelihood, and the inverse of the information (its three different entries)."""
    g0 = g1 = h00 = h01 = h11 = 0.0
    for y, x, weight in rows:
        p = _sigmoid(a + b * x)
        g0 += weight * (y - p)
        g1 += weight * (y - p) * x
        curvature = weight * p * (1 - p)
        h00, h01, h11 = h00 + curvature, h01 + curvature * x, h11 + curvature * x * x
    determinant = h00 * h11 - h01 * h01
    return (g0, g1), (h11 / determinant, -h01 / determinant, h00 / determinant)


def _intercept_variance(rows: Sequence[tuple[float, float, float]], a: float, b: float) -> float:
    """The variance of the intercept: the squared influence of every row, summed."""
    _, inverse = _gradient(rows, a, b)
    return sum(w * ((y - _sigmoid(a + b * x)) * (inverse[0] + inverse[1] * x)) ** 2 for y, x, w in rows)
