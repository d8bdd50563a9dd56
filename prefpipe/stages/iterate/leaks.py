"""Held-out prompts must be none that a round trains on: the check before the first round."""

from collections.abc import Iterator

from prefpipe.config.engine import SamplingConfig
from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.iterate import IterateConfig
from prefpipe.errors import DataError, UsageError
from prefpipe.ids import content_id
from prefpipe.inference.cutting import take_part
from prefpipe.inputs import files
from prefpipe.inputs.prompts import Prompts, read_prompts
from prefpipe.schemas import Prompt

_NUM_SHOWN = 5


def check(config: IterateConfig) -> int:
    """The number of prompts of [generate]. Raises DataError when an evaluated prompt, or one of a guard, is among them,
    by its messages, and UsageError when there are too few for the rounds."""
    table = config.generate
    training = _prompts(table.prompts, table.split, table.limit, table)
    held_out = {_key(prompt): prompt.prompt_id for prompts in _held_out(config.evaluate) for prompt in prompts}
    shared = sorted({held_out[key] for key in map(_key, training) if key in held_out})
    if shared:
        shown = ", ".join(shared[:_NUM_SHOWN]) + (", ..." if len(shared) > _NUM_SHOWN else "")
        raise DataError(
            f"{len(shared)} of {len(held_out)} prompts of [evaluate] are trained on too (prompt_id {shown})",
            "take them out of one of the files, or choose other splits in [generate] and [evaluate]",
        )
    different = 1 if config.repeat_prompts else config.rounds
    needed = different * config.prompts_per_round
    if needed > len(training):
        raise UsageError(
            f"{different} rounds of {config.prompts_per_round} prompts need {needed}, [generate] has {len(training)}",
            f"lower prompts_per_round to {len(training) // different}, or rounds, give more prompts, or set "
            "repeat_prompts",
        )
    return len(training)


def _held_out(table: EvaluateConfig) -> Iterator[Prompts]:
    """The prompts to evaluate on, and those of every guard."""
    yield _prompts(table.prompts, table.split, table.limit, table)
    for guard in table.guards:
        yield _prompts(guard.prompts, table.guard_split, 0, table)


def _prompts(source: str, split: str, limit: int, table: SamplingConfig) -> Prompts:
    prompts, _ = read_prompts(source, split, limit, files.renames(table.column))
    return take_part(prompts, table.part)


def _key(prompt: Prompt) -> str:
    """The identity of a prompt: its messages. The answer and other columns have no part in it."""
    return content_id(prompt.messages)
