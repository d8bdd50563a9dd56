"""Held-out prompts must be none that a round trains on: the check before the first round."""

from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.generate import GenerateConfig
from prefpipe.config.iterate import IterateConfig
from prefpipe.errors import DataError, UsageError
from prefpipe.inputs import files
from prefpipe.inputs.prompts import Prompts, read_prompts
from prefpipe.inputs.tokenised import prompt_key
from prefpipe.schemas import Prompt

_NUM_SHOWN = 5


def check(config: IterateConfig) -> int:
    """The number of prompts of [generate]. Raises DataError when an evaluated prompt is one of them, by its messages,
    and UsageError when there are too few for the rounds."""
    training, held_out = _prompts(config.generate), _prompts(config.evaluate)
    keys = {_key(prompt): prompt.prompt_id for prompt in held_out}
    shared = sorted({keys[key] for key in map(_key, training) if key in keys})
    if shared:
        shown = ", ".join(shared[:_NUM_SHOWN]) + (", ..." if len(shared) > _NUM_SHOWN else "")
        raise DataError(
            f"{len(shared)} of {len(held_out)} prompts of [evaluate] are trained on too (prompt_id {shown})",
            "take them out of one of the files, or choose other splits in [generate] and [evaluate]",
        )
    needed = config.rounds * config.prompts_per_round
    if needed > len(training):
        raise UsageError(
            f"{config.rounds} rounds of {config.prompts_per_round} prompts need {needed}, [generate] has "
            f"{len(training)}",
            f"lower prompts_per_round to {len(training) // config.rounds}, or rounds, or give more prompts",
        )
    return len(training)


def _prompts(table: GenerateConfig | EvaluateConfig) -> Prompts:
    prompts, _ = read_prompts(table.prompts, table.split, table.limit, files.renames(table.column))
    number, _, count = table.part.partition("/")
    return prompts.part(int(number), int(count))


def _key(prompt: Prompt) -> str:
    """The identity of a prompt for the model: its messages. The answer and other columns have no part in it."""
    return prompt_key(prompt.messages, None, prompt.template_inputs)
