"""The interface of rewards: a function from the answers of a shard to scores.

The smallest reward, which rates answers one at a time:

    def shout(settings: Shout) -> RewardFunction:
        return one_by_one(lambda answer: Scored(float(answer.text.endswith("!"))))

The function takes many answers because a judge compares the answers to one prompt, a reward model needs batches, and
processes and requests run in parallel. A score has a status beside the reward because "the answer is wrong" (reward 0)
and "nobody knows" (no reward, the checker hung) are different rows for build-pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from prefpipe.models.thinking import Said
from prefpipe.schemas import Messages, Prompt

RewardOn = Literal["answer", "all"]  # what a reward sees: the answer without its reasoning, or the whole completion


@dataclass(frozen=True)
class Answer:
    """A completion with its prompt.

    messages: the prompt
    text: the completion
    answer: the expected answer or the topic of the prompt, if it has one
    meta: the further columns of the prompts file, as a JSON object
    num_tokens: the length of the completion, None for a text without token ids
    template_inputs: JSON of tools and documents that the prompt came with
    """

    messages: Messages
    text: str
    answer: str | None
    meta: str = "{}"
    num_tokens: int | None = None
    template_inputs: str | None = None


def answer_of(prompt: Prompt, said: Said, num_tokens: int, reward_on: RewardOn) -> Answer:
    """The completion `said`, of `num_tokens` tokens, as an answer to rate."""
    text = said.text
    if reward_on == "all":
        text = (said.thinking or "") + text
    else:
        num_tokens -= said.thinking_tokens or 0
    return Answer(prompt.messages, text, prompt.answer, prompt.meta, num_tokens, prompt.template_inputs)


@dataclass(frozen=True)
class Scored:
    """A reward, or None with the reason in `detail`. The status is ok, wrong, crash, timeout or unparsable."""

    reward: float | None
    status: str = "ok"
    detail: str | None = None


# The answers to a prompt are adjacent, and all in the same call. Returns one score for each answer, in order.
RewardFunction = Callable[[Sequence[Answer]], list[Scored]]


def one_by_one(rate: Callable[[Answer], Scored]) -> RewardFunction:
    """A reward function that rates each answer alone."""
    return lambda answers: [rate(answer) for answer in answers]
