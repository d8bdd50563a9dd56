"""Rewards by name: a kind, a table of settings, or a user's function as `module:function`."""

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

from prefpipe import extras, machine, user_functions
from prefpipe.config.base import result_fields
from prefpipe.config.rewards import Settings, settings_of
from prefpipe.errors import MissingInputError
from prefpipe.ids import canonical_json
from prefpipe.rewards import function
from prefpipe.rewards.base import RewardFunction

# Kind of reward -> its module, with `KIND(settings) -> RewardFunction`, `VERSION` and `inputs(settings)`. A module is
# imported when a run names its kind, since some need heavy packages.
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
# Kind -> the extra of pip that brings its packages; for any other kind it is `rewards`.
_EXTRAS = {"math": "math", "reasoning_gym": "gym", "reward_model": "train"}
_NO_TABLES: Mapping[str, Settings] = MappingProxyType({})


def load(name: str, tables: Mapping[str, Settings] = _NO_TABLES) -> RewardFunction:
    """The reward function of a name: a kind with its defaults, a table of settings, or a user's function
    `module:function`.

    A user's function has TRL's signature for reward functions. Raises UsageError or MissingInputError for a name, file,
    package or model that does not exist, before the run samples anything.
    """
    if _has_kind(name, tables):
        settings = settings_of(name, tables)
        return getattr(_module(settings.kind), settings.kind)(settings)
    user_function = user_functions.find(name)
    return lambda answers: function.call(user_function, answers)


def identity(name: str, tables: Mapping[str, Settings] = _NO_TABLES) -> str:
    """The identity of a reward in the fingerprint of a run.

    For a kind: its name, the version of its code, the settings that can change a result, and digests of the files and
    models that it reads. For a user's function: the digest of its module.
    """
    if _has_kind(name, tables):
        settings: BaseModel = settings_of(name, tables)
        values = result_fields(settings)
        kind = values.pop("kind")
        if values.get("dtype") == "auto":  # an endpoint computes elsewhere: the number type of this machine has no part
            values["dtype"] = "bfloat16" if values.get("engine") == "endpoint" else machine.number_type()[0]
        module = _module(kind)
        values |= module.inputs(settings)
        return " ".join([f"{kind}-{module.VERSION}", *([canonical_json(values)] if values else [])])
    return user_functions.digest(name)


def _has_kind(name: str, tables: Mapping[str, Settings]) -> bool:
    return name in REWARDS or name in tables


def _module(kind: str) -> Any:
    try:
        return importlib.import_module(REWARDS[kind])
    except ModuleNotFoundError as error:
        raise MissingInputError(
            f"reward {kind} needs the package '{error.name}'", extras.hint(_EXTRAS.get(kind, "rewards"))
        ) from error
