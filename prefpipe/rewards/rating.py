"""Load rewards by name, rate completions, and name the dataset of a reward."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from prefpipe import rewards
from prefpipe.config.rewards import Settings
from prefpipe.errors import DataError
from prefpipe.rewards.base import Answer, RewardFunction, Scored


def rate(answers: Sequence[Answer], reward: RewardFunction, name: str) -> list[Scored]:
    """The score of every answer; a reward that crashes on all of them is an error."""
    scores = reward(answers) if answers else []
    if scores and all(s.status == "crash" for s in scores):
        raise DataError(
            f"reward {name} failed on all {len(scores)} completions: {scores[0].detail}", "fix the function"
        )
    return scores


def reward_folder(name: str) -> str:
    """The dataset of a reward."""
    return f"rewards/{name}"


def load_rewards(
    names: Sequence[str], tables: Mapping[str, Settings] = MappingProxyType({})
) -> tuple[dict[str, RewardFunction], dict[str, str]]:
    """Reward functions by name with their settings, and what identifies them."""
    return (
        {n: rewards.load(n, tables) for n in names},
        {f"reward {n}": rewards.identity(n, tables) for n in names},
    )
