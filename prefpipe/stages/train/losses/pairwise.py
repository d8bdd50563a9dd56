"""Losses of pairs: pure functions of a PairBatch and settings, one value per pair.

c, r = log-probs of chosen and rejected under the policy; a, b = their log-ratios to the reference; h = a - b;
S = log-sigmoid, s = sigmoid; |w|, |l| = token counts. All arithmetic in the dtype of the batch (float32 in training).
"""

import math

import torch
from torch.nn.functional import logsigmoid, relu

from prefpipe.stages.train.losses.batch import Logps, LossSettings, PairBatch

_SMALLEST_NEGATIVE = -1e-6  # mean log-prob of a certain completion: log(1 - p) is infinite at 0


def sigmoid(batch: PairBatch, s: LossSettings) -> torch.Tensor:
    """DPO: -S(beta h). Rafailov et al. 2023 (2305.18290), eq. 7. With label_smoothing e it is conservative DPO:
    -(1-e) S(beta h) - e S(-beta h), Mitchell 2023 ("cDPO")."""
    return _smoothed(s.beta * _h(batch, s), s.label_smoothing)


def sigmoid_norm(batch: PairBatch, s: LossSettings) -> torch.Tensor:
    """Length-normalised DPO: -S(beta (a/|w| - b/|l|)). Lambert et al. 2024 (Tulu 3, 2411.15124),"""
    return _smoothed(s.beta * _normalised_h(batch, s), s.label_smoothing)


def robust(batch: PairBatch, s: LossSettings) -> torch.Tensor:
    """Unbiased under labels flipped at rate e: [-(1-e) S(beta h) + e S(-beta h)] / (1-2e). Chowdhury et al. 2024
    (2403.00409). Negative for confident pairs: that is no bug."""
    x, e = s.beta * _h(batch, s), s.label_smoothing
    return (-(1 - e) * logsigmoid(x) + e * logsigmoid(-x)) / (1 - 2 * e)


def hinge(batch: PairBatch, s: LossSettings) -> torch.Tensor:
    """max(0, 1 - beta h). Liu et al. 2024 (RSO, 2309.06657), the normalised SLiC loss."""
    return relu(1 - s.beta * _h(batch, s))


def ipo(batch: PairBatch, s: LossSettings) -> torch.Tensor:
    """(h - 1/(2 beta))^2. Azar et al. 2023 (2310.12036), eq. 17, beta = tau: h of sums as in the paper, or of means per
    token as in TRL (ipo_reduction). The target is 1/(2 beta) nats per sequence or per token: never share a beta."""
    h = _h(batch, s) if s.ipo_reduction == "sum" else _normalised_h(batch, s)
    return (h - 1 / (2 * s.beta)) ** 2


def exo_pair(batch: PairBatch, s: LossSettings) -> torch.Tensor:
    """Reverse KL between (s(beta h), s(-beta h)) and (1-e, e). Ji et al. 2024 (2402.00856). Needs e > 0."""
    x, e = s.beta * _h(batch, s), s.label_smoothing
    return x.sigmoid() * (logsigmoid(x) - math.log1p(-e)) + (-x).sigmoid() * (logsigmoid(-x) - math.log(e))


def nca_pair(batch: PairBatch, s: LossSettings) -> torch.Tensor:
    """-S(beta a) - S(-beta a)/2 - S(-beta b)/2. Chen et al. 2024 (2402.05369), K = 2 with a hard preference."""
    a, b = log_ratios(batch, s)
    return -logsigmoid(s.beta * a) - 0.5 * (logsigmoid(-s.beta * a) + logsigmoid(-s.beta * b))


def bco_pair(batch: PairBatch, s: LossSettings) -> torch.Tensor:
    """-S(beta a) - S(-beta b): binary classifier optimization with reward shift 0, as TRL. Jung et al. 2024
    (2404.04656); the paper's shift, a running mean of the rewards, would be state outside of the batch."""
    a, b = log_ratios(batch, s)
    return -logsigmoid(s.beta * a) - logsigmoid(-s.beta * b)


def sppo_hard(batch: PairBatch, s: LossSettings) -> torch.Tensor:
    """(a - 1/(2 beta))^2 + (b + 1/(2 beta))^2: SPPO with preference probabilities 1 and 0, as TRL."""
    a, b = log_ratios(batch, s)
    return (a - 0.5 / s.beta) ** 2 + (b + 0.5 / s.beta) ** 2


def sppo(batch: PairBatch, s: LossSettings) -> torch.Tensor:
    """[(a - eta (P - 1/2))^2 + (b - eta (1/2 - P))^2] / 2, eta = 1/beta, P = preference_prob. Wu et al. 2024
    (2405.00675), with the normaliser approximated by eta/2."""
    a, b = log_ratios(batch, s)
    target = (_preference(batch) - 0.5) / s.beta
    return ((a - target) ** 2 + (b + target) ** 2) / 2


def apo_zero(batch: PairBatch, s: LossSettings) -> torch.Tensor:
    """s(-beta a) + s(beta b): chosen up, rejected down. D'Oosterlinck et al. 2024 (2408.06266)."""
    a, b = log_ratios(batch, s)
    return (-s.beta * a).sigmoid() + (s.beta * b).sigmoid()


def apo_down(batch: PairBatch, s: LossSettings) -> torch.Tensor:
    """s(beta a) + s(-beta h): both down, rejected more; for data worse than the policy. 2408.06266."""
    a, b = log_ratios(batch, s)
    return (s.beta * a).sigmoid() + (-s.beta * (a - b)).sigmoid()


def dpop(batch: PairBatch, s: LossSettings) -> torch.Tensor:
    """DPO-Positive: -S(beta (h - lambda max(0, -a))), lambda = dpop_lambda. Pal et al. 2024 (2402.13228)."""
    a, b = log_ratios(batch, s)
    return -logsigmoid(s.beta * (a - b - s.dpop_lambda * relu(-a)))


def rdpo(batch: PairBatch, s: LossSettings) -> torch.Tensor:
    """Length-regularised DPO: -S(beta h + alpha (|w| - |l|)), alpha = rdpo_alpha: a longer chosen completion needs less
    h. Park et al. 2024 (2403.19159)."""
    lengths = batch.chosen.lengths - batch.rejected.lengths
    return -logsigmoid(s.beta * _h(batch, s) + s.rdpo_alpha * lengths)


def margin(batch: PairBatch, s: LossSettings) -> torch.Tensor:
    """-S(beta h - alpha m), m = reward_gap, alpha = margin_alpha: Touvron et al. 2023 (2307.09288), in DPO."""
    return -logsigmoid(s.beta * _h(batch, s) - s.margin_alpha * _gap(batch))


def odpo(batch: PairBatch, s: LossSettings) -> torch.Tensor:
    """DPO with an offset: -S(beta h - alpha log(reward_gap)), alpha = margin_alpha. Amini et al. 2024 (2402.10571).
    Needs gaps above 0."""
    return -logsigmoid(s.beta * _h(batch, s) - s.margin_alpha * _gap(batch).log())


def soft(batch: PairBatch, s: LossSettings) -> torch.Tensor:
    """-P S(beta h) - (1-P) S(-beta h), P = preference_prob: cross entropy with graded labels; finite optimum
    beta h = logit P."""
    x, p = s.beta * _h(batch, s), _preference(batch)
    return -p * logsigmoid(x) - (1 - p) * logsigmoid(-x)


def rainbow(batch: PairBatch, s: LossSettings) -> torch.Tensor:
    """-S(beta [c/|w| - r/|l| - m (c0/|w| - r0/|l|) - (1-m) g]), m = rainbow_mix, g = rainbow_margin: between SimPO
    (m = 0) and sigmoid_norm (m = 1, g = 0). Zhao et al. 2024 (RainbowPO, 2410.04203)."""
    policy = batch.chosen.means - batch.rejected.means
    reference = policy - (
        _per_token(batch.chosen.ratios, batch.chosen) - _per_token(batch.rejected.ratios, batch.rejected)
    )
    x = policy - s.rainbow_mix * reference - (1 - s.rainbow_mix) * s.rainbow_margin
    return -logsigmoid(s.beta * x)


def simpo(batch: PairBatch, s: LossSettings) -> torch.Tensor:
    """-S(beta c/|w| - beta r/|l| - gamma), no reference. Meng et al. 2024 (2405.14734), eq. 6; label smoothing as in
    the authors' code."""
    return _smoothed(s.beta * (batch.chosen.means - batch.rejected.means) - gamma(s), s.label_smoothing)


def alphapo(batch: PairBatch, s: LossSettings) -> torch.Tensor:
    """SimPO with the reward (1 - p^-alpha) / alpha of the mean probability p. Gupta et al. 2025 (2501.03884)."""
    alpha = s.alphapo_alpha
    chosen, rejected = (-torch.expm1(-alpha * side.means) / alpha for side in (batch.chosen, batch.rejected))
    return -logsigmoid(s.beta * (chosen - rejected) - gamma(s))


def cpo(batch: PairBatch, s: LossSettings) -> torch.Tensor:
    """-S(beta (c - r)), no reference: the preference term of Xu et al. 2024 (2401.08417); with nll it is CPO."""
    return _smoothed(s.beta * (batch.chosen.policy - batch.rejected.policy), s.label_smoothing)


def orpo(batch: PairBatch, s: LossSettings) -> torch.Tensor:
    """NLL - beta S(log odds(w) - log odds(l)), odds = P/(1-P) of the length-averaged P; beta is the paper's lambda, as
    in TRL. Hong et al. 2024 (2403.07691), eq. 3 and 6."""
    difference = log_odds(batch.chosen.means) - log_odds(batch.rejected.means)
    return nll(batch, s) - s.beta * logsigmoid(difference)


def nll(batch: PairBatch, s: LossSettings) -> torch.Tensor:  # noqa: ARG001  (every loss has this signature)
    """Mean per-token negative log-likelihood of the chosen completion, and of its prompt where nll_scope says so: the
    NLL term of Pang et al. 2024 (2404.19733), eq. 1."""
    return -(batch.nll or batch.chosen).means


def gamma(s: LossSettings) -> float:
    """SimPO's target margin: simpo_gamma, or simpo_gamma_beta_ratio * beta where it is not given."""
    return s.simpo_gamma or s.simpo_gamma_beta_ratio * s.beta


def log_ratios(batch: PairBatch, s: LossSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """a and b, [B] each. With ld_alpha < 1 the tokens beyond the length of the shorter side count ld_alpha, under the
    policy and the reference alike. Liu et al. 2024 (LD-DPO, 2409.06411). Raises ValueError without reference."""
    return _log_ratio(batch.chosen, s.ld_alpha), _log_ratio(batch.rejected, s.ld_alpha)


def log_odds(mean_logps: torch.Tensor) -> torch.Tensor:
    """log(p / (1-p)) of mean log-probs (at most 0), stable at both ends; a mean above -1e-6 counts as -1e-6."""
    x = mean_logps.clamp(max=_SMALLEST_NEGATIVE)
    return x - torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def _smoothed(x: torch.Tensor, e: float) -> torch.Tensor:
    return -(1 - e) * logsigmoid(x) - e * logsigmoid(-x) if e else -logsigmoid(x)


def _log_ratio(side: Logps, ld_alpha: float) -> torch.Tensor:
    if ld_alpha == 1:
        return side.ratios
    if side.policy_prefix is None or side.reference_prefix is None:
        raise ValueError("ld_alpha needs the log-probs of the shared length")
    prefix = side.policy_prefix - side.reference_prefix
    return prefix + ld_alpha * (side.ratios - prefix)


def _h(batch: PairBatch, s: LossSettings) -> torch.Tensor:
    a, b = log_ratios(batch, s)
    return a - b


def _normalised_h(batch: PairBatch, s: LossSettings) -> torch.Tensor:
    a, b = log_ratios(batch, s)
    return _per_token(a, batch.chosen) - _per_token(b, batch.rejected)


def _per_token(values: torch.Tensor, side: Logps) -> torch.Tensor:
    return values / side.lengths.clamp(min=1)


def _preference(batch: PairBatch) -> torch.Tensor:
    if batch.preference_prob is None:
        raise ValueError("this loss needs preference_prob")
    return batch.preference_prob


def _gap(batch: PairBatch) -> torch.Tensor:
    if batch.reward_gap is None:
        raise ValueError("this loss needs reward_gap")
    return batch.reward_gap
