"""A user's reward function, `module:function` with the signature of TRL's reward functions.

As a name in `rewards` it is called in this process with all answers of a shard. As `kind = "function"` it is called
with one answer at a time, in a process that is killed at a time limit.
"""

import json
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from prefpipe.config.rewards import Function
from prefpipe.errors import UsageError
from prefpipe.models.turns import as_dict
from prefpipe.rewards.base import Answer, RewardFunction, Scored
from prefpipe.rewards.isolation import isolated
from prefpipe.user_functions import STOPS, digest, find, never_ends

VERSION = 1  # raise it when the reward can change: a run never mixes two versions
_ARGUMENTS = {"prompts", "completions", "answer"}  # arguments of every call, beside the further columns of the prompts


def inputs(settings: Function) -> dict[str, str]:
    """The bytes of the user's module."""
    return {"module": digest(_named(settings))}


def function(settings: Function) -> RewardFunction:
    """A reward function that calls the user's function with each answer alone.

    An answer that takes longer than `timeout_seconds` has no reward and status timeout; an answer that ends the process
    has status crash. Other answers are not affected. Raises UsageError or MissingInputError when the function does not
    exist.
    """
    name = _named(settings)
    find(name, elsewhere=True)
    rate_all = isolated(
        f"{__name__}:rate",
        timeout_seconds=settings.timeout_seconds,
        num_workers=settings.num_workers,
        imports=[name.partition(":")[0]],
    )

    def rate_answers(answers: Sequence[Answer]) -> list[Scored]:
        outcomes = rate_all([[name, asdict(answer)] for answer in answers])
        return [Scored(*o.value) if o.status == "ok" else Scored(None, o.status, o.detail) for o in outcomes]

    return rate_answers


def rate(name: str, answer: dict[str, Any]) -> list[Any]:
    """[reward, status, detail] of one answer. The processes of `isolated` call this function."""
    (scored,) = call(find(name), [Answer(**answer)])
    return [scored.reward, scored.status, scored.detail]


def call(function: Callable[..., Any], answers: Sequence[Answer]) -> list[Scored]:
    """Scores by `function(prompts, completions, answer, COLUMN...)` as in TRL: lists of messages in, numbers out.

    The function returns one number, or None, for each answer. COLUMN is every further column of the prompts file, by
    name; its value is None for a prompt without it.
    """
    metas = [json.loads(a.meta) for a in answers]
    columns = {name: [m.get(name) for m in metas] for name in sorted({n for m in metas for n in m} - _ARGUMENTS)}
    try:
        with never_ends():
            values = function(
                prompts=[[as_dict(m) for m in a.messages] for a in answers],
                completions=[[{"role": "assistant", "content": a.text}] for a in answers],
                answer=[a.answer for a in answers],
                **columns,
            )
            values = list(values)
    except STOPS:
        raise
    except BaseException as error:
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


def _named(settings: Function) -> str:
    if not settings.function:
        raise UsageError("a reward of kind 'function' names none", 'write function = "module:function" into its table')
    return settings.function
