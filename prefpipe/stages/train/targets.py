"""What the chosen losses aim at, in nats on the data at hand, and settings out of reach. Said before step 0."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from prefpipe.config.train import TrainConfig
from prefpipe.stages.train.examples import TrainLabel, TrainRow

_PER_TOKEN = ("sigmoid_norm", "rainbow", "simpo", "alphapo")  # beta multiplies nats per token
_FREE_OF_BETA = ("nll", "orpo")
_LARGEST_TARGET = 2.0  # nats per token
_SMALLEST_BETA = {False: 0.005, True: 0.5}  # of a summed and of a length-normalised loss
_RATIO = (1.0, 1.5)  # lambda_D n_D / (lambda_U n_U): Ethayarajh et al. 2024 (2402.01306), eq. 9
_PROPOSED_RATIO = 1.25


@dataclass(frozen=True)
class Targets:
    """Lines that explain the losses, and warnings about their settings and about the classes of labels."""

    lines: list[str]
    warnings: list[str]
    class_warnings: list[str]


def targets(config: TrainConfig, rows: Sequence[TrainRow]) -> Targets:
    """beta and the finite optimum of every loss in nats and nats per token, at the mean completion length of `rows`."""
    lengths = [len(completion.token_ids) for row in rows for completion in row.completions]
    mean = sum(lengths) / len(lengths)
    lines = [line for name in config.loss_type for line in _explain(name, config, mean)]
    warnings = [line for name in config.loss_type for line in _warn(name, config, mean)]
    labels = cast("Sequence[TrainLabel]", rows) if isinstance(rows[0], TrainLabel) else ()
    return Targets(lines, warnings, class_warnings(config, labels) if labels else [])


def class_warnings(config: TrainConfig, rows: Sequence[TrainLabel]) -> list[str]:
    """A class without rows, or weights outside of the ratio rule, with weights that keep it."""
    desirable = sum(bool(row.desirable) for row in rows)
    undesirable = len(rows) - desirable
    if not desirable or not undesirable:
        lacking = "undesirable" if desirable else "desirable"
        return [f"no row is {lacking}: a loss of labels has nothing to contrast"]
    ratio = config.desirable_weight * desirable / (config.undesirable_weight * undesirable)
    if _RATIO[0] <= ratio <= _RATIO[1]:
        return []
    proposed = _PROPOSED_RATIO * undesirable / desirable
    better = f"--desirable-weight {proposed:.4g}" if proposed >= 1 else f"--undesirable-weight {1 / proposed:.4g}"
    return [
        f"{desirable} desirable and {undesirable} undesirable rows with weights {config.desirable_weight:g} and "
        f"{config.undesirable_weight:g} have a ratio of {ratio:.3g}, outside of [1, 1.5]: {better} alone makes it 1.25"
    ]


def _explain(name: str, config: TrainConfig, mean: float) -> list[str]:
    beta, e = config.beta, config.label_smoothing
    if name in _FREE_OF_BETA:
        return []
    if name == "ipo":
        unit = _both(0.5 / beta, mean) if config.ipo_reduction == "sum" else f"{0.5 / beta:.4g} nats per token"
        return [f"ipo: h is drawn to 1/(2 beta) = {unit}"]
    if name in ("sppo_hard", "sppo"):
        return [f"{name}: log-ratios are drawn to at most +-1/(2 beta) = {_both(0.5 / beta, mean)}"]
    if name in ("simpo", "alphapo"):
        ratio = config.simpo_gamma / beta or config.simpo_gamma_beta_ratio
        return [f"{name}: beta {beta:g}, target margin gamma / beta = {ratio:.4g} nats per token"]
    if name in _PER_TOKEN:
        scale = f"{1 / beta:.4g} nats per token"
    elif name == "cpo":
        scale = f"{_both(1 / beta, mean)} of log-prob difference"
    else:
        scale = _both(1 / beta, mean)
    lines = [f"{name}: beta {beta:g}, a reward of 1 is 1/beta = {scale}"]
    if e and name in ("sigmoid", "exo_pair", "cpo"):
        optimum = math.log((1 - e) / e) / beta
        lines.append(f"{name}: label_smoothing {e:g} stops it at {_both(optimum, mean)}")
    return lines


def _warn(name: str, config: TrainConfig, mean: float) -> list[str]:
    if name in _FREE_OF_BETA:
        return []
    if name == "ipo":
        target = 0.5 / config.beta / (mean if config.ipo_reduction == "sum" else 1.0)
        if target > _LARGEST_TARGET:
            return [
                f"ipo: a target of {target:.3g} nats per token is out of reach, so its pull never ends: raise beta to "
                f"{0.5 / _LARGEST_TARGET / (mean if config.ipo_reduction == 'sum' else 1.0):.3g} or more"
            ]
        return []
    smallest = _SMALLEST_BETA[name in _PER_TOKEN]
    if config.beta < smallest:
        unit = "nats per token (published: 2 to 10)" if name in _PER_TOKEN else "summed nats (published: 0.01 to 0.5)"
        return [f"{name}: beta {config.beta:g} is below {smallest:g}, small for a loss of {unit}"]
    return []


def _both(nats: float, mean: float) -> str:
    return f"{nats:.4g} nats ({nats / mean:.3g} per token at {mean:.0f} tokens)"
