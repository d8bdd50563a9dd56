"""The curves of the playground, from the losses themselves: each loss and its pull over a grid of margins and settings.

The path: both completions have TOKENS tokens, at one nat per token under the reference. Chosen rises by h/2 nats and
rejected falls by h/2. The pull is -dL/dh. Labels: the mean over a desirable row that rises and an undesirable one that
falls, z0 = 0. Groups: two completions.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from prefpipe.config.losses import LOSSES, LossSettings
from prefpipe.stages.train.losses import registry
from prefpipe.stages.train.losses.batch import LabelBatch, Logps, LossBatch, PairBatch, RankBatch

TOKENS = 20
MARGINS = [*range(-40, -10, 4), *[h / 2 for h in range(-20, 21)], *range(12, 41, 4)]
BETAS = {
    "per nat": [0.01, 0.03, 0.1, 0.3, 1.0],
    "per nat per token": [0.5, 1.0, 2.0, 5.0, 10.0],
    "no temperature": [0.05, 0.1, 0.2, 0.5, 1.0],
}
SMOOTHING = [0.0, 0.1, 0.3]
GAMMAS = [0.0, 0.25, 0.5, 1.0]


def stops(name: str) -> dict[str, list[float]]:
    """The settings of a loss that the playground moves, with their values."""
    loss = LOSSES[name]
    found: dict[str, list[float]] = {}
    if "beta" in loss.settings:
        found["beta"] = BETAS[loss.beta]
    if "label_smoothing" in loss.settings:
        found["label_smoothing"] = SMOOTHING if not loss.settings_above_0 else [0.001, *SMOOTHING[1:]]
    if "simpo_gamma_beta_ratio" in loss.settings:
        found["simpo_gamma_beta_ratio"] = GAMMAS
    return found


def curve(name: str, settings: Mapping[str, float]) -> tuple[list[float], list[float]]:
    """A loss at every margin, and its pull there."""
    h = torch.tensor(MARGINS, dtype=torch.float64, requires_grad=True)
    values = registry.loss(name, _batch(name, h), LossSettings(**settings))  # type: ignore[arg-type]  # numbers
    if LOSSES[name].kind == "labels":
        values = values.view(2, -1).mean(0)
    (slope,) = torch.autograd.grad(values.sum(), h)
    return values.tolist(), (-slope).tolist()


def grid_of(name: str) -> dict[str, Any]:
    """The curves of a loss, one for each point of its settings, the last setting fastest."""
    moved = stops(name)
    curves = [curve(name, dict(zip(moved, point, strict=True))) for point in itertools.product(*moved.values())]
    return {
        "beta": LOSSES[name].beta,
        "settings": moved,
        "loss": [_rounded(values) for values, _ in curves],
        "pull": [_rounded(pull) for _, pull in curves],
    }


def grid() -> dict[str, Any]:
    """Everything that curves.json holds."""
    return {"margins": MARGINS, "tokens": TOKENS, "losses": {name: grid_of(name) for name in LOSSES}}


def as_text(grid: Mapping[str, Any]) -> str:
    """curves.json: a line for each loss."""
    tight = partial(json.dumps, separators=(",", ":"))
    losses = ",\n".join(f"{tight(name)}:{tight(of)}" for name, of in grid["losses"].items())
    return f'{{"margins":{tight(grid["margins"])},"tokens":{grid["tokens"]},"losses":{{\n{losses}\n}}}}\n'


def _batch(name: str, h: torch.Tensor) -> LossBatch:
    lengths = torch.full_like(h, TOKENS)
    reference = -lengths
    chosen, rejected = (Logps(reference + h * share, lengths, reference) for share in (0.5, -0.5))
    if LOSSES[name].kind == "pairs":
        return PairBatch(chosen, rejected, torch.full_like(h, 0.9), torch.ones_like(h))
    if LOSSES[name].kind == "groups":
        both = [torch.stack(sides, -1) for sides in zip(vars(chosen).values(), vars(rejected).values(), strict=True)
                if sides[0] is not None]  # fmt: skip
        return RankBatch(Logps(*both), torch.ones_like(both[0], dtype=torch.bool))
    rows = Logps(*(torch.cat(sides) for sides in ((chosen.policy_logps, rejected.policy_logps),
                                                  (lengths, lengths), (reference, reference))))  # fmt: skip
    return LabelBatch(rows, torch.cat([torch.ones_like(h), torch.zeros_like(h)]).bool())


def _rounded(values: Sequence[float]) -> list[float]:
    """Seven digits."""
    return [float(f"{value:.7g}") for value in values]
