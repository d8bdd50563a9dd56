"""Losses of pairs: functions of a PairBatch and the settings that they read, one value per pair, [B].

In the formulas: c, r = log-probs of the chosen and the rejected completion under the policy, c0, r0 = under the
reference; a = c - c0, b = r - r0 and h = a - b are log-ratios; |w|, |l| = tokens of chosen and rejected; s = sigmoid,
S = log-sigmoid. All arithmetic is in the dtype of the batch (float32 in training).

A function that reads what its batch lacks raises ValueError. The name of a function is the name of its loss; what else
is known of the loss stands in prefpipe/config/losses.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import logsigmoid, relu

from prefpipe.stages.train.losses.batch import Logps, PairBatch

if TYPE_CHECKING:  # what `settings` holds; losses see tensors and numbers, and import no configuration
    from prefpipe.config.losses import LossSettings

_SMALLEST_NEGATIVE = -1e-6  # mean log-prob of a certain completion: log(1 - p) is infinite at 0


def sigmoid(batch: PairBatch, settings: LossSettings) -> torch.Tensor:
    """DPO: -S(beta h). Rafailov et al. 2023 (2305.18290), eq. 7. With label_smoothing e it is conservative DPO:
    -(1-e) S(beta h) - e S(-beta h), Mitchell 2023 ("cDPO")."""
    return _smoothed(settings.beta * _h(batch, settings), settings.label_smoothing)


def sigmoid_norm(batch: PairBatch, settings: LossSettings) -> torch.Tensor:
    """Length-normalised DPO: -S(beta (a/|w| - b/|l|)); label smoothing as in `sigmoid`. Lambert et al. 2024 (Tulu 3,
    2411.15124)."""
    return _smoothed(settings.beta * _normalised_h(batch, settings), settings.label_smoothing)


def robust(batch: PairBatch, settings: LossSettings) -> torch.Tensor:
    """Unbiased when labels are flipped at the rate e = label_smoothing: [-(1-e) S(beta h) + e S(-beta h)] / (1-2e).
    Chowdhury et al. 2024 (2403.00409). It is negative for confident pairs: that is no bug."""
    beta_h, e = settings.beta * _h(batch, settings), settings.label_smoothing
    return (-(1 - e) * logsigmoid(beta_h) + e * logsigmoid(-beta_h)) / (1 - 2 * e)


def hinge(batch: PairBatch, settings: LossSettings) -> torch.Tensor:
    """max(0, 1 - beta h). Liu et al. 2024 (RSO, 2309.06657), the normalised SLiC loss."""
    return relu(1 - settings.beta * _h(batch, settings))


def ipo(batch: PairBatch, settings: LossSettings) -> torch.Tensor:
    """(h - 1/(2 beta))^2, beta is the paper's tau. Azar et al. 2023 (2310.12036), eq. 17. With ipo_reduction "sum" h is
    of sums, as in the paper; with "mean" it is a/|w| - b/|l|, as in TRL. The target 1/(2 beta) is then in nats per
    token: the two never share a beta."""
    h = _h(batch, settings) if settings.ipo_reduction == "sum" else _normalised_h(batch, settings)
    return (h - 1 / (2 * settings.beta)) ** 2


def exo_pair(batch: PairBatch, settings: LossSettings) -> torch.Tensor:
    """Reverse KL between (s(beta h), s(-beta h)) and (1-e, e), e = label_smoothing above 0. Ji et al. 2024
    (2402.00856)."""
    beta_h, e = settings.beta * _h(batch, settings), settings.label_smoothing
    right, flipped = logsigmoid(beta_h) - math.log1p(-e), logsigmoid(-beta_h) - math.log(e)
    return beta_h.sigmoid() * right + (-beta_h).sigmoid() * flipped


def nca_pair(batch: PairBatch, settings: LossSettings) -> torch.Tensor:
    """-S(beta a) - S(-beta a)/2 - S(-beta b)/2. Chen et al. 2024 (2402.05369), K = 2 with a hard preference."""
    a, b = log_ratios(batch, settings)
    return -logsigmoid(settings.beta * a) - 0.5 * (logsigmoid(-settings.beta * a) + logsigmoid(-settings.beta * b))


def bco_pair(batch: PairBatch, settings: LossSettings) -> torch.Tensor:
    """-S(beta a) - S(-beta b): binary classifier optimization with a reward shift of 0, as in TRL. Jung et al. 2024
    (2404.04656). The paper shifts by a running mean of the rewards, which would be state outside of the batch."""
    a, b = log_ratios(batch, settings)
    return -logsigmoid(settings.beta * a) - logsigmoid(-settings.beta * b)


def sppo_hard(batch: PairBatch, settings: LossSettings) -> torch.Tensor:
    """(a - 1/(2 beta))^2 + (b + 1/(2 beta))^2: SPPO with preference probabilities 1 and 0, as TRL."""
    a, b = log_ratios(batch, settings)
    return (a - 0.5 / settings.beta) ** 2 + (b + 0.5 / settings.beta) ** 2


def sppo(batch: PairBatch, settings: LossSettings) -> torch.Tensor:
    """[(a - eta (P - 1/2))^2 + (b - eta (1/2 - P))^2] / 2, eta = 1/beta, P = preference_prob. Wu et al. 2024
    (2405.00675), with the normaliser approximated by eta/2."""
    a, b = log_ratios(batch, settings)
    target = (_preference_prob(batch) - 0.5) / settings.beta
    return ((a - target) ** 2 + (b + target) ** 2) / 2


def cal_dpo(batch: PairBatch, settings: LossSettings) -> torch.Tensor:
    """-S(h) + w [(a - 1/(2 beta))^2 + (b + 1/(2 beta))^2], w = cal_dpo_weight. Xiao et al. 2024 (Cal-DPO, 2412.14516):
    h, without beta, contrasts the sides; the squares calibrate the implicit rewards beta a and beta b to 1/2 and -1/2.
    The paper's loss has w = 1; w = 0 is DPO with a beta of 1."""
    a, b = log_ratios(batch, settings)
    calibration = (a - 0.5 / settings.beta) ** 2 + (b + 0.5 / settings.beta) ** 2
    return -logsigmoid(a - b) + settings.cal_dpo_weight * calibration


def apo_zero(batch: PairBatch, settings: LossSettings) -> torch.Tensor:
    """s(-beta a) + s(beta b): chosen up, rejected down. D'Oosterlinck et al. 2024 (2408.06266)."""
    a, b = log_ratios(batch, settings)
    return (-settings.beta * a).sigmoid() + (settings.beta * b).sigmoid()


def apo_down(batch: PairBatch, settings: LossSettings) -> torch.Tensor:
    """s(beta a) + s(-beta h): both down, rejected more; for data worse than the policy. D'Oosterlinck et al. 2024
    (2408.06266)."""
    a, b = log_ratios(batch, settings)
    return (settings.beta * a).sigmoid() + (-settings.beta * (a - b)).sigmoid()


def dpop(batch: PairBatch, settings: LossSettings) -> torch.Tensor:
    """DPO-Positive: -S(beta (h - lambda max(0, -a))), lambda = dpop_lambda. Pal et al. 2024 (2402.13228)."""
    a, b = log_ratios(batch, settings)
    return -logsigmoid(settings.beta * (a - b - settings.dpop_lambda * relu(-a)))


def rdpo(batch: PairBatch, settings: LossSettings) -> torch.Tensor:
    """Length-regularised DPO: -S(beta h + alpha (|w| - |l|)), alpha = rdpo_alpha: a longer chosen completion needs less
    h. Park et al. 2024 (2403.19159)."""
    lengths = batch.chosen.lengths - batch.rejected.lengths
    return -logsigmoid(settings.beta * _h(batch, settings) + settings.rdpo_alpha * lengths)


def margin(batch: PairBatch, settings: LossSettings) -> torch.Tensor:
    """-S(beta h - alpha m), m = reward_gap, alpha = margin_alpha: the margin of Touvron et al. 2023 (2307.09288), in
    DPO."""
    return -logsigmoid(settings.beta * _h(batch, settings) - settings.margin_alpha * _reward_gap(batch))


def odpo(batch: PairBatch, settings: LossSettings) -> torch.Tensor:
    """DPO with an offset: -S(beta h - alpha log(m)), m = reward_gap above 0, alpha = margin_alpha. Amini et al. 2024
    (2402.10571)."""
    return -logsigmoid(settings.beta * _h(batch, settings) - settings.margin_alpha * _reward_gap(batch).log())


def soft(batch: PairBatch, settings: LossSettings) -> torch.Tensor:
    """-P S(beta h) - (1-P) S(-beta h), P = preference_prob: cross entropy with graded labels; finite optimum
    beta h = logit P."""
    beta_h, prob = settings.beta * _h(batch, settings), _preference_prob(batch)
    return -prob * logsigmoid(beta_h) - (1 - prob) * logsigmoid(-beta_h)


def rainbow(batch: PairBatch, settings: LossSettings) -> torch.Tensor:
    """-S(beta [c/|w| - r/|l| - m (c0/|w| - r0/|l|) - (1-m) g]), m = rainbow_mix, g = rainbow_margin: between SimPO
    (m = 0) and sigmoid_norm (m = 1, g = 0). Zhao et al. 2024 (RainbowPO, 2410.04203)."""
    policy = batch.chosen.mean_logps - batch.rejected.mean_logps
    reference = policy - (
        _per_token(batch.chosen.log_ratios, batch.chosen) - _per_token(batch.rejected.log_ratios, batch.rejected)
    )
    mixed = policy - settings.rainbow_mix * reference - (1 - settings.rainbow_mix) * settings.rainbow_margin
    return -logsigmoid(settings.beta * mixed)


def simpo(batch: PairBatch, settings: LossSettings) -> torch.Tensor:
    """-S(beta c/|w| - beta r/|l| - gamma), no reference. Meng et al. 2024 (2405.14734), eq. 6; label smoothing as in
    the authors' code."""
    difference = batch.chosen.mean_logps - batch.rejected.mean_logps
    return _smoothed(settings.beta * difference - gamma(settings), settings.label_smoothing)


def alphapo(batch: PairBatch, settings: LossSettings) -> torch.Tensor:
    """SimPO with the reward (1 - p^-alpha) / alpha of the length-averaged probability p, alpha = alphapo_alpha. Gupta
    et al. 2025 (2501.03884)."""
    alpha = settings.alphapo_alpha
    chosen, rejected = (-torch.expm1(-alpha * side.mean_logps) / alpha for side in (batch.chosen, batch.rejected))
    return -logsigmoid(settings.beta * (chosen - rejected) - gamma(settings))


def cpo(batch: PairBatch, settings: LossSettings) -> torch.Tensor:
    """-S(beta (c - r)), no reference; label smoothing as in `sigmoid`. The preference term of Xu et al. 2024
    (2401.08417): with nll added it is CPO."""
    difference = batch.chosen.policy_logps - batch.rejected.policy_logps
    return _smoothed(settings.beta * difference, settings.label_smoothing)


def orpo(batch: PairBatch, settings: LossSettings) -> torch.Tensor:
    """NLL - beta S(log odds(w) - log odds(l)), odds = p/(1-p) of the length-averaged probability p of a completion.
    Hong et al. 2024 (2403.07691), eq. 3 and 6; beta is the paper's lambda, as in TRL."""
    difference = log_odds(batch.chosen.mean_logps) - log_odds(batch.rejected.mean_logps)
    return nll(batch, settings) - settings.beta * logsigmoid(difference)


def nll(batch: PairBatch, settings: LossSettings) -> torch.Tensor:  # noqa: ARG001  (every loss has this signature)
    """-c/|w|: mean negative log-likelihood of a token of the chosen completion, and of its prompt where nll_scope says
    so. The NLL term of Pang et al. 2024 (2404.19733), eq. 1."""
    return -(batch.nll or batch.chosen).mean_logps


def gamma(settings: LossSettings) -> float:
    """SimPO's target margin in units of the reward: simpo_gamma, or simpo_gamma_beta_ratio * beta where that is 0."""
    return settings.simpo_gamma or settings.simpo_gamma_beta_ratio * settings.beta


def log_ratios(batch: PairBatch, settings: LossSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """a and b, [B] each, in nats. With ld_alpha < 1 the tokens beyond the length of the shorter side count ld_alpha,
    under the policy and the reference alike. Liu et al. 2024 (LD-DPO, 2409.06411)."""
    return _log_ratio(batch.chosen, settings.ld_alpha), _log_ratio(batch.rejected, settings.ld_alpha)


def log_odds(mean_logps: torch.Tensor) -> torch.Tensor:
    """log(p / (1-p)) of mean log-probs (at most 0), stable at both ends; a mean above -1e-6 counts as -1e-6."""
    x = mean_logps.clamp(max=_SMALLEST_NEGATIVE)
    return x - torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def _smoothed(x: torch.Tensor, e: float) -> torch.Tensor:
    """-(1-e) S(x) - e S(-x)."""
    return -(1 - e) * logsigmoid(x) - e * logsigmoid(-x) if e else -logsigmoid(x)


def _log_ratio(side: Logps, ld_alpha: float) -> torch.Tensor:
    if ld_alpha == 1:
        return side.log_ratios
    if side.policy_prefix_logps is None or side.reference_prefix_logps is None:
        raise ValueError("ld_alpha needs the log-probs of the shared length")
    prefix = side.policy_prefix_logps - side.reference_prefix_logps
    return prefix + ld_alpha * (side.log_ratios - prefix)


def _h(batch: PairBatch, settings: LossSettings) -> torch.Tensor:
    a, b = log_ratios(batch, settings)
    return a - b


def _normalised_h(batch: PairBatch, settings: LossSettings) -> torch.Tensor:
    a, b = log_ratios(batch, settings)
    return _per_token(a, batch.chosen) - _per_token(b, batch.rejected)


def _per_token(values: torch.Tensor, side: Logps) -> torch.Tensor:
    return values / side.lengths.clamp(min=1)


def _preference_prob(batch: PairBatch) -> torch.Tensor:
    if batch.preference_prob is None:
        raise ValueError("this loss needs preference_prob")
    return batch.preference_prob


def _reward_gap(batch: PairBatch) -> torch.Tensor:
    if batch.reward_gap is None:
        raise ValueError("this loss needs reward_gap")
    return batch.reward_gap
