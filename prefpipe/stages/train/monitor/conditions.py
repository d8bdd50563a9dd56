"""The conditions of the alert rules: each looks at a `View` and returns what it sees, in words, or None.

D = log-ratio of policy and reference, in nats. Thresholds without a paper come from runs of known outcome: small models
that were trained well moved the chosen completions by +0.03 to +0.07 nats per token, those that collapsed by -0.24 to
-0.38.
"""

import math
from itertools import pairwise

from prefpipe.stages.train.monitor.diagnostics import View, running_median, slope

_FALL, _DEEP_FALL, _COLLAPSE = -0.02, -0.10, -0.30  # D of chosen, nats per token
_FALL_PER_COMPLETION = -20.0  # D of chosen, nats
_BOTH_FALL = 0.70  # share of pairs
_H_AT_STEP_0 = 0.05  # mean |h|, nats
_LOSS_AT_STEP_0, _SMALL_AT_STEP_0 = 0.01, 1e-3  # share of the loss at the reference; nats, where that is next to 0
_DEVIATIONS = 4  # standard deviations of kernel noise
_CHANCE = (0.45, 0.55)  # accuracy
_RATE_SHARE = 0.10  # of the peak learning rate
_SURE, _SMALL_LOSS, _EVAL_GAP = 0.99, 0.05, 0.15  # accuracy, loss, difference of accuracies
_EVALS = 2  # in a row
_LARGE_MARGIN, _SATURATED_SHARE = 5.0, 0.5  # mean |margin|, share of pairs
_KL, _KL_PER_TOKEN = 10.0, 0.1  # nats, nats per token
_GROWTH, _GROWTH_SHARE = 2.0, 0.10  # factor, over this share of the run
_FLOOR_SHARE, _NOTHING_SHARE = 0.5, 0.005  # of the limits of A9: from where growth counts; what counts as 0
_NORM_FACTOR = 10.0  # times the running median
_SKIPS = 3  # steps
_Z0_SHARE = 0.80  # of the steps


def stale_cache(view: View) -> str | None:
    """A0: step 0 is not at the reference."""
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
    limit = max(_LOSS_AT_STEP_0 * abs(there), _SMALL_AT_STEP_0) + noise
    if not abs(loss - there) > limit:
        return None
    return f"the loss is {loss:.4f} and not {there:.4f} before anything was learned (limit {limit:.4f} apart)"


def chosen_falls(view: View) -> str | None:
    """A1: chosen completions get less likely."""
    means = view.two_windows("deltas/chosen")
    if not means or not view.slope("deltas/chosen") < 0 or not _last(view, "deltas/chosen") < _FALL:
        return None
    return f"chosen completions are at {means[-1]:+.3f} nats per token against the reference, and fall"


def chosen_collapses(view: View) -> str | None:
    """A2: chosen completions got far less likely."""
    per_token = view.all_in_window("deltas/chosen", lambda d: d < _DEEP_FALL)
    nats = view.all_in_window("rewards/chosen", lambda r: r / view.facts.beta < _FALL_PER_COMPLETION)
    if not per_token and not nats:
        return None
    d, r = _last(view, "deltas/chosen"), _last(view, "rewards/chosen") / view.facts.beta
    return f"chosen completions lost {-d:.3f} nats per token ({-r:.1f} per completion) against the reference"


def displaced(view: View) -> str | None:
    """A3: likelihood displacement: both sides fall while the margin grows."""
    if view.all_in_window("deltas/chosen", lambda d: d < _COLLAPSE):
        return f"chosen completions lost {-_last(view, 'deltas/chosen'):.3f} nats per token against the reference"
    # Log-ratios around 0 are both negative often enough: only a fall that can be seen counts.
    falls = view.all_in_window("deltas/chosen", lambda d: d < _FALL)
    both = view.all_in_window("rewards/both_fall", lambda share: share > _BOTH_FALL)
    if not falls or not both or not view.slope("rewards/margins") > 0:
        return None
    return f"both sides fall in {_last(view, 'rewards/both_fall'):.0%} of the pairs while the margin grows"


def at_chance(view: View) -> str | None:
    """A4: the policy prefers chosen as often as a coin does."""
    means = view.two_windows("rewards/accuracies")
    if not means or not view.after_warmup(len(means)) or not all(_CHANCE[0] <= m <= _CHANCE[1] for m in means):
        return None
    return f"rewards/accuracies stays at {means[-1]:.2f}: a coin would do as well"


def inverted(view: View) -> str | None:
    """A4b: the policy prefers rejected."""
    if not view.after_warmup(4) or not view.all_in_window("rewards/accuracies", lambda a: a < _CHANCE[0]):
        return None
    return f"rewards/accuracies is {_last(view, 'rewards/accuracies'):.2f} on the rows that are trained on"


def margin_stands(view: View) -> str | None:
    """A5: nothing is learned at a high learning rate."""
    margins, rates = view.two_windows("rewards/margins"), view.two_windows("learning_rate")
    if not margins or not rates or not view.after_warmup(len(margins)):
        return None
    if min(rates) <= _RATE_SHARE * view.facts.learning_rate or not view.slope("rewards/margins") <= 0:
        return None
    return f"rewards/margins is {margins[-1]:.3f} and does not grow"


def overfits(view: View) -> str | None:
    """A6: the training rows are learned by heart."""
    sure = view.all_in_window("rewards/accuracies", lambda a: a > _SURE)
    if not sure or not view.all_in_window("loss", lambda loss: loss < _SMALL_LOSS):
        return None
    return f"accuracy {_last(view, 'rewards/accuracies'):.3f} and loss {_last(view, 'loss'):.3f} on the training rows"


def eval_lags(view: View) -> str | None:
    """A6b: held-out rows are far behind the training rows."""
    train, held_out = view.window("rewards/accuracies"), view.values.get("eval_rewards/accuracies")
    if not train or held_out is None or not held_out < sum(train) / len(train) - _EVAL_GAP:
        return None
    return f"accuracy {sum(train) / len(train):.2f} on training rows, {held_out:.2f} on held-out ones"


def eval_loss_rises(view: View) -> str | None:
    """A7: the eval loss is past its minimum."""
    if view.state.evals_above < _EVALS:
        return None
    lowest = view.state.lowest_eval_loss
    return f"eval_loss {view.values['eval_loss']:.4f} is above its minimum {lowest:.4f} for {_EVALS} evaluations"


def saturated(view: View) -> str | None:
    """A8: most pairs have next to no gradient left."""
    large = view.all_in_window("rewards/abs_margins", lambda m: m > _LARGE_MARGIN)
    if not large and not view.all_in_window("rewards/saturated", lambda share: share > _SATURATED_SHARE):
        return None
    size, share = _last(view, "rewards/abs_margins"), _last(view, "rewards/saturated")
    return f"mean |margin| {size:.2f}; {share:.0%} of the pairs have a gradient weight below 0.01"


def far_away(view: View) -> str | None:
    """A9: the policy is far from the reference."""
    nats = view.all_in_window("kl/ref_policy", lambda kl: kl > _KL)
    if not nats and not view.all_in_window("kl/ref_policy_per_token", lambda kl: kl > _KL_PER_TOKEN):
        return None
    per_token = _last(view, "kl/ref_policy_per_token")
    return f"KL(ref || policy) is about {_last(view, 'kl/ref_policy'):.1f} nats, {per_token:.3f} per token"


def runs_away(view: View) -> str | None:
    """A9b: the policy moves away from the reference ever faster."""
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


def bad_gradient(view: View) -> str | None:
    """A13: a gradient that is not finite, or far above the usual."""
    if view.last_skipped:
        return "loss or gradient is not finite: the step moved nothing"
    usual, norm = running_median(view.state.norms), view.values.get("grad_norm")
    if not usual or norm is None or not norm > _NORM_FACTOR * usual:
        return None
    return f"gradient norm {norm:.3g}, {norm / usual:.0f} times its running median"


def too_many_skips(view: View) -> str | None:
    """A13b: several steps moved nothing, or none of a run of fewer moved anything."""
    if len(view.state.skipped) < min(_SKIPS, view.facts.num_steps):
        return None
    return f"loss or gradient was not finite at steps {', '.join(map(str, view.state.skipped))}"


def classes_fall(view: View) -> str | None:
    """A15: desirable and undesirable completions both fall."""
    if "kto/z0" not in view.values:
        return None
    sides = [view.window(f"rewards/{side}") for side in ("chosen", "rejected")]
    if not all(means and all(b < a for a, b in pairwise(means)) for means in sides):
        return None
    return f"the rewards of both classes fall: {sides[0][-1]:.3f} desirable, {sides[1][-1]:.3f} undesirable"


def z0_stays_0(view: View) -> str | None:
    """A15b: the reference point of KTO says nothing."""
    shares = view.window("kto/z0_is_0")
    if not shares or not view.after_warmup(len(shares)) or not sum(shares) / len(shares) >= _Z0_SHARE:
        return None
    return f"z0 is 0 at {sum(shares) / len(shares):.0%} of the steps"


def never(view: View) -> str | None:  # noqa: ARG001
    """A15c and A16, which are found before step 0, from settings and data."""
    return None


def _last(view: View, name: str) -> float:
    """The newest block mean; NaN without one."""
    means = view.window(name)
    return means[-1] if means else float("nan")
