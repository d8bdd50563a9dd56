"""Losses of a user, right and wrong, for tests of losses by `module:function`."""

from typing import Any

import torch
from torch.nn.functional import logsigmoid


def dpo(batch: Any, settings: Any) -> torch.Tensor:
    """The built-in `sigmoid`, written anew."""
    return -logsigmoid(settings.beta * (batch.chosen.log_ratios - batch.rejected.log_ratios))


def unpaired(batch: Any, settings: Any) -> torch.Tensor:
    """For labels: up for desirable rows, down for the others."""
    side = batch.completion
    return torch.where(batch.desirable, -side.log_ratios, side.log_ratios) * settings.beta


def ranked(batch: Any, settings: Any) -> torch.Tensor:
    """For groups: the best completion up."""
    return -settings.beta * batch.completions.log_ratios[:, 0]


def graded(batch: Any, settings: Any) -> torch.Tensor:
    """Reads a column that some pairs lack."""
    return dpo(batch, settings) * batch.reward_gap


def backwards(batch: Any, settings: Any) -> torch.Tensor:
    """With the wrong sign."""
    return -dpo(batch, settings)


def flat(batch: Any, settings: Any) -> torch.Tensor:
    """Without a slope at the reference."""
    return (batch.chosen.log_ratios - batch.rejected.log_ratios) ** 2


def mean(batch: Any, settings: Any) -> torch.Tensor:
    """One number for all rows."""
    return dpo(batch, settings).mean()


def centred(batch: Any, settings: Any) -> torch.Tensor:
    """Rows that depend on the others."""
    return batch.chosen.policy_logps - batch.chosen.policy_logps.mean()


def infinite(batch: Any, settings: Any) -> torch.Tensor:
    """No value at the reference."""
    return (batch.chosen.log_ratios).log()


def steep(batch: Any, settings: Any) -> torch.Tensor:
    """A value at the reference, but no gradient there."""
    return batch.chosen.log_ratios.abs().sqrt()


def detached(batch: Any, settings: Any) -> torch.Tensor:
    """No gradient."""
    return dpo(batch, settings).detach()


def number(batch: Any, settings: Any) -> float:
    """No tensor."""
    return 0.5


def leaves(batch: Any, settings: Any) -> torch.Tensor:
    """Ends the process."""
    raise SystemExit(0)
