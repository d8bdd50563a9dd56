"""Rewards by name, or a function of the user's as `module:function`."""

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

from prefpipe.config.base import result_fields
from prefpipe.config.rewards import Settings, settings_of
from prefpipe.errors import MissingInputError
from prefpipe.ids import canonical_json
from prefpipe.rewards import function
from prefpipe.rewards.base import RewardFunction

# Kind of reward -> the module that has `KIND(settings) -> RewardFunction`, `VERSION` and `inputs(settings)`. Loaded
# only when asked for, since some bring heavy packages.
REWARDS = {
    **dict.fromkeys(("short_sentence", "length", "keyword", "repetition", "refusal"), "prefpipe.rewards.text_rules"),
    **dict.fromkeys(("regex", "exact_match"), "prefpipe.rewards.patterns"),
    "json_schema": "prefpipe.rewards.json_schema",
    "language": "prefpipe.rewards.language",
    "math": "prefpipe.rewards.math_answers",
    "reasoning_gym": "prefpipe.rewards.gym",
    "code": "prefpipe.rewards.code_tests",
    "reward_model": "prefpipe.rewards.model",
    "judge": "prefpipe.rewards.judge",
    "function": "prefpipe.rewards.function",
}
_EXTRAS = {"math": "math", "reasoning_gym": "gym", "reward_model": "train"}  # any other: rewards
_NO_TABLES: Mapping[str, Settings] = MappingProxyType({})


def load(name: str, tables: Mapping[str, Settings] = _NO_TABLES) -> RewardFunction:
    """A reward by name: a kind with its defaults, a table of settings, or the user's own `module:function`.

    A function of the user's has TRL's signature for reward functions. Raises UsageError or MissingInputError (a name,
    file, package or model that is not there) before anything is sampled.
    """
    if _is_ours(name, tables):
        settings = settings_of(name, tables)
        return getattr(_module(settings.kind), settings.kind)(settings)
    found = function.find(name)
    return lambda answers: function.call(found, answers)


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
    return function.digest(name)


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
