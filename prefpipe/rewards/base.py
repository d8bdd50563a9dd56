"""What a reward is: a function from answers to scores, in batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prefpipe.schemas import Messages


@dataclass(frozen=True)
class Answer:
    """A completion with what it answers. `answer` is the expected answer or topic of the prompt, if it has one."""

    messages: Messages
    text: str
    answer: str | None


@dataclass(frozen=True)
class Scored:
    """A reward, or None with the reason. status: ok, wrong, crash, timeout, unparsable."""

    reward: float | None
    status: str = "ok"
    detail: str | None = None


RewardFunction = Callable[[Sequence[Answer]], list[Scored]]
