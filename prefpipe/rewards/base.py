"""What a reward is: a function from answers to scores, in batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prefpipe.schemas import Messages


@dataclass(frozen=True)
class Answer:
    """A completion with what it answers.

    `answer` is the expected answer or topic of the prompt, if it has one; `meta` what else the prompt carries, as a
    JSON object; `num_tokens` the length of the completion in tokens, where it was sampled or tokenised.
    """

    messages: Messages
    text: str
    answer: str | None
    meta: str = "{}"
    num_tokens: int | None = None


@dataclass(frozen=True)
class Scored:
    """A reward, or None with the reason. status: ok, wrong, crash, timeout, unparsable."""

    reward: float | None
    status: str = "ok"
    detail: str | None = None


# Called with the answers of whole prompts, those of one prompt beside each other: some rewards compare them.
RewardFunction = Callable[[Sequence[Answer]], list[Scored]]


def one_by_one(rate: Callable[[Answer], Scored]) -> RewardFunction:
    """A reward that looks at one answer at a time."""
    return lambda answers: [rate(answer) for answer in answers]
