"""What the chosen losses aim at, in nats on the data at hand, and settings out of reach. Said before step 0."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from prefpipe.config.losses import (
    CLASS_RATIO,
    PROPOSED_CLASS_RATIO,
    LossSettings,
    Objective,
    class_weights,
    in_class_ratio,
    loss_of,
)
from prefpipe.stages.train.examples import TrainLabel, TrainRow
from prefpipe.stages.train.mapped import column
from prefpipe.stages.train.record_batches import Batch

_SMALLEST_BETA = {
    "per nat": (0.005, "summed nats (published: 0.01 to 0.5)"),
    "per nat per token": (0.5, "nats per token (published: 2 to 10)"),
}


@dataclass(frozen=True)
class Targets:
    """Lines that explain the losses, and warnings about their settings and about the classes of labels."""

    lines: list[str]
    warnings: list[str]
    class_warnings: list[str]


def targets(objective: Objective, rows: Sequence[TrainRow]) -> Targets:
    """The target of every loss in nats and in nats per token, at the mean completion length of `rows`."""
    mean_tokens = float(column(rows, Batch.num_scored).sum() / column(rows, Batch.num_completions).sum())
    lines = [line for name in objective.names for line in _explain(name, objective.settings, mean_tokens)]
    warnings = [line for name in objective.names for line in _warn(name, objective.settings, mean_tokens)]
    labels = cast("Sequence[TrainLabel]", rows) if isinstance(rows[0], TrainLabel) else ()
    return Targets(lines, warnings, class_warnings(objective.settings, labels) if labels else [])


def class_warnings(settings: LossSettings, rows: Sequence[TrainLabel]) -> list[str]:
    """A class without rows, or class weights outside of KTO's ratio, with weights that keep it."""
    desirable = int(column(rows, Batch.desirable).sum())
    undesirable = len(rows) - desirable
    if not desirable or not undesirable:
        lacking = "undesirable" if desirable else "desirable"
        return [f"no row is {lacking}: a loss of labels has nothing to contrast"]
    ratio = settings.desirable_weight * desirable / (settings.undesirable_weight * undesirable)
    if in_class_ratio(ratio):
        return []
    smallest, largest = CLASS_RATIO
    for_desirable, for_undesirable = class_weights(desirable, undesirable)
    better = (
        f"--desirable-weight {for_desirable:.4g}"
        if for_undesirable == 1
        else f"--undesirable-weight {for_undesirable:.4g}"
    )
    return [
        f"{desirable} desirable and {undesirable} undesirable rows with weights {settings.desirable_weight:g} and "
        f"{settings.undesirable_weight:g} have a ratio of {ratio:.3g}, outside of [{smallest:g}, {largest:g}]: "
        f"{better} alone makes it {PROPOSED_CLASS_RATIO:g}"
    ]


def _explain(name: str, settings: LossSettings, mean_tokens: float) -> list[str]:
    """The target of a loss, and where label smoothing stops it."""
    loss, beta, smoothing = loss_of(name), settings.beta, settings.label_smoothing
    if not loss.target:
        return []
    per_token = _is_per_token(name, settings)
    one, half = (_in_nats(nats, mean_tokens, per_token=per_token) for nats in (1 / beta, 0.5 / beta))
    lines = [f"{name}: {loss.target.format(beta=beta, one=one, half=half, margin=settings.margin)}"]
    if smoothing and loss.smoothing_stops_it:
        optimum = _in_nats(math.log((1 - smoothing) / smoothing) / beta, mean_tokens, per_token=per_token)
        lines.append(f"{name}: label_smoothing {smoothing:g} stops it at {optimum}")
    return lines


def _warn(name: str, settings: LossSettings, mean_tokens: float) -> list[str]:
    """A target that no policy reaches, or a beta below those that were published."""
    loss, beta = loss_of(name), settings.beta
    if loss.beta == "no temperature":
        return []
    if loss.largest_target is not None:
        tokens = 1.0 if _is_per_token(name, settings) else mean_tokens
        target = 0.5 / beta / tokens
        if target <= loss.largest_target:
            return []
        return [
            f"{name}: a target of {target:.3g} nats per token is out of reach, so its pull never ends: raise beta to "
            f"{0.5 / loss.largest_target / tokens:.3g} or more"
        ]
    smallest, unit = _SMALLEST_BETA[loss.beta]
    return [f"{name}: beta {beta:g} is below {smallest:g}, small for a loss of {unit}"] if beta < smallest else []


def _is_per_token(name: str, settings: LossSettings) -> bool:
    """Whether beta multiplies log-probs per token."""
    loss = loss_of(name)
    if loss.per_token_if is None:
        return loss.beta == "per nat per token"
    setting, value = loss.per_token_if
    return getattr(settings, setting) == value


def _in_nats(nats: float, mean_tokens: float, *, per_token: bool) -> str:
    if per_token:
        return f"{nats:.4g} nats per token"
    return f"{nats:.4g} nats ({nats / mean_tokens:.3g} per token at {mean_tokens:.0f} tokens)"
