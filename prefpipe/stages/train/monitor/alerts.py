"""The alert rules by name: docs/diagnostics.md has their table. D = log-ratio of policy and reference, in nats.

Thresholds without a paper come from runs whose outcome is known: small models that were trained well moved the chosen
completions by +0.03 to +0.07 nats per token, those that collapsed by -0.24 to -0.38.
"""

import math
from itertools import pairwise

from prefpipe.stages.train.monitor.diagnostics import TOO_MANY_SKIPS, Rule, View, running_median, slope

_RAZIN = "Razin et al. 2024 (2410.08847)"
_RAFAILOV = "Rafailov et al. 2024 (2406.02900)"
_MEASURED = "measured on runs of known outcome"
_OURS = "our choice"
_FALL, _DEEP_FALL, _COLLAPSE = -0.02, -0.10, -0.30  # nats per token
_FALL_PER_SEQUENCE = -20.0  # nats
_BOTH_FALL = 0.70
_H_AT_STEP_0 = 0.05  # nats
_LOSS_AT_STEP_0, _SMALL = 0.01, 1e-3  # share of the loss at the reference; where that is next to 0
_DEVIATIONS = 4
_CHANCE = (0.45, 0.55)
_RATE_SHARE = 0.10
_SURE, _SMALL_LOSS, _EVAL_GAP = 0.99, 0.05, 0.15
_EVALS = 2
_LARGE_REWARD, _SATURATED_SHARE = 5.0, 0.5
_KL, _KL_PER_TOKEN = 10.0, 0.1
_GROWTH, _GROWTH_SHARE, _FLOOR_SHARE, _NOTHING_SHARE = 2.0, 0.10, 0.5, 0.005
_NORM_FACTOR = 10.0
_SKIPS = 3
_Z0_SHARE = 0.80


def _stale_cache(view: View) -> str | None:
    if view.step:
        return None
    h = view.values.get("rewards/abs_margins", 0.0) / view.facts.beta
    if view.facts.exact and h > _H_AT_STEP_0:
        return f"mean |h| is {h:.3g} nats before anything was learned"
    names = ("loss", "at_reference", "shift", "variance")
    if not all(f"start/{name}" in view.values for name in names):
        return None
    loss, there, shift, variance = (view.values[f"start/{name}"] for name in names)
    noise = abs(shift) + _DEVIATIONS * math.sqrt(variance)
    limit = max(_LOSS_AT_STEP_0 * abs(there), _SMALL) + noise
    if not abs(loss - there) > limit:
        return None
    return f"the loss is {loss:.4f} and not {there:.4f} before anything was learned (limit {limit:.4f} apart)"


def _chosen_falls(view: View) -> str | None:
    means = view.two_windows("deltas/chosen")
    if not means or not view.slope("deltas/chosen") < 0 or not _last(view, "deltas/chosen") < _FALL:
        return None
    return f"chosen completions are at {means[-1]:+.3f} nats per token against the reference, and fall"


def _chosen_collapses(view: View) -> str | None:
    per_token = view.all_in_window("deltas/chosen", lambda d: d < _DEEP_FALL)
    nats = view.all_in_window("rewards/chosen", lambda r: r / view.facts.beta < _FALL_PER_SEQUENCE)
    if not per_token and not nats:
        return None
    d, r = _last(view, "deltas/chosen"), _last(view, "rewards/chosen") / view.facts.beta
    return f"chosen completions lost {-d:.3f} nats per token ({-r:.1f} per completion) against the reference"


def _displaced(view: View) -> str | None:
    if view.all_in_window("deltas/chosen", lambda d: d < _COLLAPSE):
        return f"chosen completions lost {-_last(view, 'deltas/chosen'):.3f} nats per token against the reference"
    # Log-ratios around 0 are both negative often enough: only a fall that can be seen counts.
    falls = view.all_in_window("deltas/chosen", lambda d: d < _FALL)
    both = view.all_in_window("rewards/both_fall", lambda share: share > _BOTH_FALL)
    if not falls or not both or not view.slope("rewards/margins") > 0:
        return None
    return f"both sides fall in {_last(view, 'rewards/both_fall'):.0%} of the pairs while the margin grows"


def _at_chance(view: View) -> str | None:
    means = view.two_windows("rewards/accuracies")
    if not means or not view.after_warmup(len(means)) or not all(_CHANCE[0] <= m <= _CHANCE[1] for m in means):
        return None
    return f"rewards/accuracies stays at {means[-1]:.2f}: a coin would do as well"


def _inverted(view: View) -> str | None:
    if not view.after_warmup(4) or not view.all_in_window("rewards/accuracies", lambda a: a < _CHANCE[0]):
        return None
    return f"rewards/accuracies is {_last(view, 'rewards/accuracies'):.2f} on the rows that are trained on"


def _margin_stands(view: View) -> str | None:
    margins, rates = view.two_windows("rewards/margins"), view.two_windows("learning_rate")
    if not margins or not rates or not view.after_warmup(len(margins)):
        return None
    if min(rates) <= _RATE_SHARE * view.facts.learning_rate or not view.slope("rewards/margins") <= 0:
        return None
    return f"rewards/margins is {margins[-1]:.3f} and does not grow"


def _overfits(view: View) -> str | None:
    sure = view.all_in_window("rewards/accuracies", lambda a: a > _SURE)
    if not sure or not view.all_in_window("loss", lambda loss: loss < _SMALL_LOSS):
        return None
    return f"accuracy {_last(view, 'rewards/accuracies'):.3f} and loss {_last(view, 'loss'):.3f} on the training rows"


def _eval_lags(view: View) -> str | None:
    train, held_out = view.window("rewards/accuracies"), view.values.get("eval_rewards/accuracies")
    if not train or held_out is None or not held_out < sum(train) / len(train) - _EVAL_GAP:
        return None
    return f"accuracy {sum(train) / len(train):.2f} on training rows, {held_out:.2f} on held-out ones"


def _eval_loss_rises(view: View) -> str | None:
    if view.state.evals_above < _EVALS:
        return None
    lowest = view.state.lowest_eval_loss
    return f"eval_loss {view.values['eval_loss']:.4f} is above its minimum {lowest:.4f} for {_EVALS} evaluations"


def _saturated(view: View) -> str | None:
    large = view.all_in_window("rewards/abs_margins", lambda m: m > _LARGE_REWARD)
    if not large and not view.all_in_window("rewards/saturated", lambda share: share > _SATURATED_SHARE):
        return None
    size, share = _last(view, "rewards/abs_margins"), _last(view, "rewards/saturated")
    return f"mean |margin| {size:.2f}; {share:.0%} of the pairs have a gradient weight below 0.01"


def _far_away(view: View) -> str | None:
    nats = view.all_in_window("kl/ref_policy", lambda kl: kl > _KL)
    if not nats and not view.all_in_window("kl/ref_policy_per_token", lambda kl: kl > _KL_PER_TOKEN):
        return None
    per_token = _last(view, "kl/ref_policy_per_token")
    return f"KL(ref || policy) is about {_last(view, 'kl/ref_policy'):.1f} nats, {per_token:.3f} per token"


def _runs_away(view: View) -> str | None:
    for name, limit, unit in (("kl/ref_policy", _KL, "nats"), ("kl/ref_policy_per_token", _KL_PER_TOKEN, "per token")):
        means = view.two_windows(name)
        # Near 0 everything doubles all the time: from half of A9's limit on, twofold growth is past it within a tenth.
        if not means or not means[-1] > _FLOOR_SHARE * limit:
            continue
        per_block = slope([math.log(max(mean, _NOTHING_SHARE * limit)) for mean in means])
        growth = math.exp(min(per_block * _GROWTH_SHARE * view.facts.num_steps / view.facts.block, 10.0))
        if growth > _GROWTH:
            return f"KL(ref || policy) is about {means[-1]:.3g} {unit} and grows {growth:.1f}-fold per 10 % of the run"
    return None


def _bad_gradient(view: View) -> str | None:
    if view.last_skipped:
        return "loss or gradient is not finite: the step moved nothing"
    usual, norm = running_median(view.state.norms), view.values.get("grad_norm")
    if not usual or norm is None or not norm > _NORM_FACTOR * usual:
        return None
    return f"gradient norm {norm:.3g}, {norm / usual:.0f} times its running median"


def _too_many_skips(view: View) -> str | None:
    if len(view.state.skipped) < _SKIPS:
        return None
    return f"loss or gradient was not finite at steps {', '.join(map(str, view.state.skipped))}"


def _classes_fall(view: View) -> str | None:
    if "kto/z0" not in view.values:
        return None
    sides = [view.window(f"rewards/{side}") for side in ("chosen", "rejected")]
    if not all(means and all(b < a for a, b in pairwise(means)) for means in sides):
        return None
    return f"the rewards of both classes fall: {sides[0][-1]:.3f} desirable, {sides[1][-1]:.3f} undesirable"


def _z0_stays_0(view: View) -> str | None:
    shares = view.window("kto/z0_is_0")
    if not shares or not view.after_warmup(len(shares)) or not sum(shares) / len(shares) >= _Z0_SHARE:
        return None
    return f"z0 is 0 at {sum(shares) / len(shares):.0%} of the steps"


def _last(view: View, name: str) -> float:
    """The newest block mean; NaN without one."""
    means = view.window(name)
    return means[-1] if means else float("nan")


def _never(view: View) -> str | None:  # noqa: ARG001  (said before step 0, from settings and data)
    return None


RULES: dict[str, Rule] = {
    "A0": Rule(
        "step",
        "STOP",
        "step 0: mean absolute h > 0.05 nats (fp32, same scorer); or a loss off its value at h = 0 by > 1 %, noise of "
        "kernels aside",
        "the cache belongs to another model, template or truncation: score again",
        "h is 0 by construction",
        _stale_cache,
    ),
    "A1": Rule(
        "block",
        "NOTICE",
        "D of chosen < -0.02 per token for the last W/4, slope < 0 over 2W",
        "expected when the reference was fine-tuned on the chosen completions; watch A2",
        "Rafailov et al. 2024 (2404.12358)",
        _chosen_falls,
    ),
    "A2": Rule(
        "block",
        "WARN",
        "D of chosen < -0.10 per token, or < -20 nats per completion, for W",
        "add an nll loss (weight 0.2 to 1) or choose another (docs/losses.md), lower learning_rate, or raise beta",
        f"{_RAZIN}; {_MEASURED}",
        _chosen_collapses,
    ),
    "A3": Rule(
        "block",
        "STOP",
        "D of chosen < -0.30 per token for W; or both sides fall in > 70 % of pairs for W (and D of chosen < -0.02) "
        "while the margin grows",
        "likelihood displacement: go back to the last good checkpoint and add an nll loss",
        f"{_RAZIN}; {_MEASURED}",
        _displaced,
    ),
    "A4": Rule(
        "block",
        "WARN",
        "accuracy in [0.45, 0.55] for 2W after warmup",
        "check learning_rate, beta and whether the pairs carry a signal",
        _OURS,
        _at_chance,
    ),
    "A4b": Rule(
        "block",
        "WARN",
        "accuracy < 0.45 for W after warmup",
        "chosen and rejected, or policy and reference, look swapped",
        _MEASURED,
        _inverted,
    ),
    "A5": Rule(
        "block",
        "WARN",
        "margin slope <= 0 over 2W while the learning rate is above 10 % of its peak",
        "raise learning_rate if margins are small; if they are large, beta * h is saturated",
        _OURS,
        _margin_stands,
    ),
    "A6": Rule(
        "block",
        "WARN",
        "accuracy > 0.99 and loss < 0.05 for W",
        "overfitting: stop, train fewer epochs, or set label_smoothing 0.1",
        "cDPO: Mitchell 2023",
        _overfits,
    ),
    "A6b": Rule(
        "eval",
        "WARN",
        "held-out accuracy below that of the training rows (W) by more than 0.15",
        "overfitting: fewer epochs, label_smoothing 0.1, or more prompts",
        _OURS,
        _eval_lags,
    ),
    "A7": Rule(
        "eval",
        "WARN",
        "eval loss above its minimum by 5 % at 2 evaluations in a row",
        "stop early and keep the checkpoint of the minimum",
        _OURS,
        _eval_loss_rises,
    ),
    "A8": Rule(
        "block",
        "INFO",
        "mean absolute margin > 5, or > 50 % of pairs with s(-beta h) < 0.01, for W",
        "saturated: the rows that are left teach little, stop or raise beta",
        "gradient of DPO: 2305.18290, section 4",
        _saturated,
    ),
    "A9": Rule(
        "block",
        "WARN",
        "KL(ref to policy) > 10 nats or > 0.1 per token for W, on rows sampled from the reference",
        "past the usual optimum: evaluate, then raise beta or stop earlier",
        _RAFAILOV,
        _far_away,
    ),
    "A9b": Rule(
        "block",
        "WARN",
        "KL(ref to policy) grows more than twofold per 10 % of the run over 2W, and is above half of a limit of A9",
        "it passes the limits of A9 soon: lower learning_rate, or raise beta",
        _OURS,
        _runs_away,
    ),
    "A13": Rule(
        "step",
        "WARN",
        "gradient norm > 10 times its running median (50 steps), or not finite",
        "look at the rows of this step; lower learning_rate if it happens again",
        _OURS,
        _bad_gradient,
    ),
    TOO_MANY_SKIPS: Rule(
        "step",
        "STOP",
        "3 steps in 100 with a loss or gradient that is not finite (stops without strict too)",
        "look at these rows, or lower learning_rate; the last checkpoint is intact",
        _OURS,
        _too_many_skips,
    ),
    "A15": Rule(
        "block",
        "WARN",
        "kto: the rewards of both classes fall from block to block for W",
        "learning_rate is too high, or beta too small",
        "KTO: 2402.01306",
        _classes_fall,
    ),
    "A15b": Rule(
        "block",
        "WARN",
        "kto: z0 is 0 at 80 % of the steps of W after warmup",
        "the policy barely moves or the bank says nothing: raise learning_rate or kl_rows",
        "KTO: 2402.01306",
        _z0_stays_0,
    ),
    "A15c": Rule(
        "start",
        "WARN",
        "weighted ratio of desirable to undesirable rows outside of [1, 1.5], or a class is missing",
        "set the class weights so that the ratio is 1 to 1.5",
        "KTO: 2402.01306, eq. 9",
        _never,
    ),
    "A16": Rule(
        "start",
        "WARN",
        "beta < 0.005 (sums) or < 0.5 (per token), or a target above 2 nats per token",
        "match beta and the margin to the length of the completions",
        "docs/losses.md",
        _never,
    ),
}
