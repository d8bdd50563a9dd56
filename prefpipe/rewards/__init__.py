"""Rewards by name, or a function of the user's as `module:function`."""

import importlib
import json
import math
import numbers
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

from prefpipe import fsio
from prefpipe.config.base import result_fields
from prefpipe.config.rewards import Settings, settings_of
from prefpipe.errors import MissingInputError, UsageError
from prefpipe.ids import canonical_json
from prefpipe.rewards.base import Answer, RewardFunction, Scored

# Kind of reward -> the module that has `KIND(settings) -> RewardFunction`, `VERSION` and `inputs(settings)`. Loaded
# only when asked for, since some bring heavy packages.
REWARDS = {
    **dict.fromkeys(("short_sentence", "length", "keyword", "repetition", "refusal"), "prefpipe.rewards.rules"),
    **dict.fromkeys(("regex", "exact_match"), "prefpipe.rewards.patterns"),
    "json_schema": "prefpipe.rewards.json_schema",
    "language": "prefpipe.rewards.language",
    "math": "prefpipe.rewards.math_answers",
    "reasoning_gym": "prefpipe.rewards.gym",
    "code": "prefpipe.rewards.code_tests",
    "reward_model": "prefpipe.rewards.model",
    "judge": "prefpipe.rewards.judge",
}
_EXTRAS = {"math": "math", "reasoning_gym": "gym", "reward_model": "train"}  # any other: rewards
_GIVEN = {"prompts", "completions", "answer"}
_NO_TABLES: Mapping[str, Settings] = MappingProxyType({})


def load(name: str, tables: Mapping[str, Settings] = _NO_TABLES) -> RewardFunction:
    """A reward by name: a kind with its defaults, a table of settings, or the user's own `module:function`.

    A function of the user's has TRL's signature for reward functions. Raises UsageError or MissingInputError (a name,
    file, package or model that is not there) before anything is sampled.
    """
    if _is_ours(name, tables):
        settings = settings_of(name, tables)
        return getattr(_module(settings.kind), settings.kind)(settings)
    function = _find(name)
    return lambda answers: _call_users(function, answers)


def identity(name: str, tables: Mapping[str, Settings] = _NO_TABLES) -> str:
    """What a reward is, for the fingerprint of a run.

    Ours: kind, version of its code, what matters of its settings, digests of files and models it reads. The user's: the
    bytes of the module.
    """
    if _is_ours(name, tables):
        settings: BaseModel = settings_of(name, tables)
        values = result_fields(settings)
        kind = values.pop("kind")
        module = _module(kind)
        values |= module.inputs(settings)
        return " ".join([f"{kind}-{module.VERSION}", *([canonical_json(values)] if values else [])])
    _find(name)
    source = sys.modules[name.partition(":")[0]].__file__
    return fsio.file_digest(Path(source)) if source else name


def _is_ours(name: str, tables: Mapping[str, Settings]) -> bool:
    return name in REWARDS or name in tables


def _module(kind: str) -> Any:
    try:
        return importlib.import_module(REWARDS[kind])
    except ModuleNotFoundError as error:
        raise MissingInputError(
            f"reward {kind} needs the package '{error.name}'",
            f"install it with: pip install 'prefpipe[{_EXTRAS.get(kind, 'rewards')}]'",
        ) from error


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


def _call_users(function: Callable[..., Any], answers: Sequence[Answer]) -> list[Scored]:
    """`function(prompts, completions, answer, COLUMN...)` as in TRL: lists of messages in, numbers or None out.

    The further columns of the prompts file come by name, None where a prompt lacks one.
    """
    metas = [json.loads(a.meta) for a in answers]
    columns = {name: [m.get(name) for m in metas] for name in sorted({n for m in metas for n in m} - _GIVEN)}
    try:
        values = function(
            prompts=[a.messages for a in answers],
            completions=[[{"role": "assistant", "content": a.text}] for a in answers],
            answer=[a.answer for a in answers],
            **columns,
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
