"""The alert rules by name; docs/diagnostics.md has this table. D = log-ratio of policy and reference, in nats."""

from prefpipe.stages.train.monitor import conditions
from prefpipe.stages.train.monitor.diagnostics import TOO_MANY_SKIPS, Rule

_RAZIN = "Razin et al. 2024 (2410.08847)"
_RAFAILOV = "Rafailov et al. 2024 (2406.02900)"
_MEASURED = "measured on runs of known outcome"
_OURS = "our choice"

RULES: dict[str, Rule] = {
    "A0": Rule(
        "step",
        "STOP",
        "step 0: mean absolute h > 0.05 nats (fp32, same scorer); or a loss off its value at h = 0 by > 1 %, noise of "
        "kernels aside",
        "the cache belongs to another model, template or truncation: score again",
        "h is 0 by construction",
        conditions.stale_cache,
    ),
    "A1": Rule(
        "block",
        "NOTICE",
        "D of chosen < -0.02 per token for the last W/4, slope < 0 over 2W",
        "expected when the reference was fine-tuned on the chosen completions; watch A2",
        "Rafailov et al. 2024 (2404.12358)",
        conditions.chosen_falls,
    ),
    "A2": Rule(
        "block",
        "WARN",
        "D of chosen < -0.10 per token, or < -20 nats per completion, for W",
        "add an nll loss (weight 0.2 to 1) or choose another (docs/losses.md), lower learning_rate, or raise beta",
        f"{_RAZIN}; {_MEASURED}",
        conditions.chosen_collapses,
    ),
    "A3": Rule(
        "block",
        "STOP",
        "D of chosen < -0.30 per token for W; or both sides fall in > 70 % of pairs for W (and D of chosen < -0.02) "
        "while the margin grows",
        "likelihood displacement: go back to the last good checkpoint and add an nll loss",
        f"{_RAZIN}; {_MEASURED}",
        conditions.displaced,
    ),
    "A4": Rule(
        "block",
        "WARN",
        "accuracy in [0.45, 0.55] for 2W after warmup",
        "check learning_rate, beta and whether the pairs carry a signal",
        _OURS,
        conditions.at_chance,
    ),
    "A4b": Rule(
        "block",
        "WARN",
        "accuracy < 0.45 for W after warmup",
        "chosen and rejected, or policy and reference, look swapped",
        _MEASURED,
        conditions.inverted,
    ),
    "A5": Rule(
        "block",
        "WARN",
        "margin slope <= 0 over 2W while the learning rate is above 10 % of its peak",
        "raise learning_rate if margins are small; if they are large, beta * h is saturated",
        _OURS,
        conditions.margin_stands,
    ),
    "A6": Rule(
        "block",
        "WARN",
        "accuracy > 0.99 and loss < 0.05 for W",
        "overfitting: stop, train fewer epochs, or set label_smoothing 0.1",
        "cDPO: Mitchell 2023",
        conditions.overfits,
    ),
    "A6b": Rule(
        "eval",
        "WARN",
        "held-out accuracy below that of the training rows (W) by more than 0.15",
        "overfitting: fewer epochs, label_smoothing 0.1, or more prompts",
        _OURS,
        conditions.eval_lags,
    ),
    "A7": Rule(
        "eval",
        "WARN",
        "eval loss above its minimum by 5 % at 2 evaluations in a row",
        "stop early and keep the checkpoint of the minimum",
        _OURS,
        conditions.eval_loss_rises,
    ),
    "A8": Rule(
        "block",
        "INFO",
        "mean absolute margin > 5, or > 50 % of pairs with s(-beta h) < 0.01, for W",
        "saturated: the rows that are left teach little, stop or raise beta",
        "gradient of DPO: 2305.18290, section 4",
        conditions.saturated,
    ),
    "A9": Rule(
        "block",
        "WARN",
        "KL(ref to policy) > 10 nats or > 0.1 per token for W, on rows sampled from the reference",
        "past the usual optimum: evaluate, then raise beta or stop earlier",
        _RAFAILOV,
        conditions.far_away,
    ),
    "A9b": Rule(
        "block",
        "WARN",
        "KL(ref to policy) grows more than twofold per 10 % of the run over 2W, and is above half of a limit of A9",
        "it passes the limits of A9 soon: lower learning_rate, or raise beta",
        _OURS,
        conditions.runs_away,
    ),
    "A13": Rule(
        "step",
        "WARN",
        "gradient norm > 10 times its running median (50 steps), or not finite",
        "look at the rows of this step; lower learning_rate if it happens again",
        _OURS,
        conditions.bad_gradient,
    ),
    TOO_MANY_SKIPS: Rule(
        "step",
        "STOP",
        "3 steps in 100, or all of fewer, with a loss or gradient that is not finite (stops without strict too)",
        "look at these rows, or lower learning_rate; the last checkpoint is intact",
        _OURS,
        conditions.too_many_skips,
    ),
    "A15": Rule(
        "block",
        "WARN",
        "kto: the rewards of both classes fall from block to block for W",
        "learning_rate is too high, or beta too small",
        "KTO: 2402.01306",
        conditions.classes_fall,
    ),
    "A15b": Rule(
        "block",
        "WARN",
        "kto: z0 is 0 at 80 % of the steps of W after warmup",
        "the policy barely moves or the bank says nothing: raise learning_rate or kl_rows",
        "KTO: 2402.01306",
        conditions.z0_stays_0,
    ),
    "A15c": Rule(
        "start",
        "WARN",
        "weighted ratio of desirable to undesirable rows outside of [1, 1.5], or a class is missing",
        "set the class weights so that the ratio is 1 to 1.5",
        "KTO: 2402.01306, eq. 9",
        conditions.never,
    ),
    "A16": Rule(
        "start",
        "WARN",
        "beta < 0.005 (sums) or < 0.5 (per token), or a target above 2 nats per token",
        "match beta and the margin to the length of the completions",
        "docs/losses.md",
        conditions.never,
    ),
}
