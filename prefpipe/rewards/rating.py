"""Load rewards by name, rate completions, and name the dataset of a reward."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from prefpipe import rewards
from prefpipe.config.rewards import Settings
from prefpipe.errors import DataError
from prefpipe.rewards.base import Answer, RewardFunction, Scored


def rate(answers: Sequence[Answer], reward: RewardFunction, name: str) -> list[Scored]:
    """The score of every answer. Raises DataError when the reward crashes on every one of them."""
    scores = reward(answers) if answers else []
    if scores and all(s.status == "crash" for s in scores):
        raise DataError(
            f"reward {name} failed on all {len(scores)} completions: {scores[0].detail}", "fix the function"
        )
    return scores


def reward_folder(name: str) -> str:
    """The name of the dataset that holds a reward."""
    return f"rewards/{name}"


def load_rewards(
    names: Sequence[str], tables: Mapping[str, Settings] = MappingProxyType({})
) -> tuple[dict[str, RewardFunction], dict[str, str]]:
    """Reward functions by name, and what identifies each in the fingerprint of a run."""
    return (
        {n: rewards.load(n, tables) for n in names},
        {f"reward {n}": rewards.identity(n, tables) for n in names},
    )
