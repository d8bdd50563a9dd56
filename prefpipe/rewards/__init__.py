"""Rewards by name, or a function of the user's as `module:function`."""

import importlib
import math
import numbers
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefpipe import fsio
from prefpipe.errors import MissingInputError, UsageError
from prefpipe.rewards import rules
from prefpipe.rewards.base import Answer, RewardFunction, Scored

REWARDS: dict[str, RewardFunction] = {"short_sentence": rules.short_sentence}


def load(name: str) -> RewardFunction:
    """A reward by name; `module:function` is the user's own, with TRL's signature for reward functions."""
    if name in REWARDS:
        return REWARDS[name]
    function = _find(name)
    return lambda answers: _call_users(function, answers)


def _find(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))  # a module beside the recipe is what users mean
    try:
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise MissingInputError(
            f"reward {name}: no module '{error.name}'", "run from the folder that holds it"
        ) from error
    except AttributeError as error:
        raise UsageError(f"reward {name}: {module} has no '{function}'", "check the name of the function") from error
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"reward {name} cannot be imported: {error}", "write it as module:function") from error
    finally:
        sys.path.pop(0)


def identity(name: str) -> str:
    """What a reward is, for the fingerprint of a run: the version of our rules, or the bytes of the user's module."""
    if name in REWARDS:
        return f"rules-{rules.VERSION}"
    _find(name)
    source = sys.modules[name.partition(":")[0]].__file__
    return fsio.file_digest(Path(source)) if source else name


def _call_users(function: Callable[..., Any], answers: Sequence[Answer]) -> list[Scored]:
    """`function(prompts, completions, answer)` as in TRL: lists of messages in, a number or None per completion out."""
    try:
        values = function(
            prompts=[a.messages for a in answers],
            completions=[[{"role": "assistant", "content": a.text}] for a in answers],
            answer=[a.answer for a in answers],
        )
        values = list(values)
    except Exception as error:
        return [Scored(None, "crash", f"{type(error).__name__}: {error}")] * len(answers)
    if len(values) != len(answers):
        return [Scored(None, "crash", f"{len(values)} rewards for {len(answers)} completions")] * len(answers)
    return [_scored(value) for value in values]


def _scored(value: object) -> Scored:
    if value is None:
        return Scored(None, "unparsable", "the function returned None")
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        return Scored(None, "crash", f"the function returned {value!r}")
    return Scored(float(value))
