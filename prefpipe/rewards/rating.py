"""Load rewards by name, rate completions, and name the dataset of a reward."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from prefpipe import log, rewards
from prefpipe.config.reward_sum import LARGEST_REWARD
from prefpipe.config.rewards import Settings
from prefpipe.errors import DataError
from prefpipe.rewards.base import Answer, RewardFunction, Scored


def rate(answers: Sequence[Answer], reward: RewardFunction, name: str) -> list[Scored]:
    """The score of every answer. A reward beyond LARGEST_REWARD counts as a crash. Raises DataError when the reward
    function crashes on every answer."""
    scores = [_bounded(score) for score in reward(answers)] if answers else []
    if scores and all(s.status == "crash" for s in scores):
        raise DataError(
            f"reward {name} failed on all {len(scores)} completions: {scores[0].detail}", "fix the function"
        )
    return scores


def totals(columns: Mapping[str, Iterable[Sequence[float | None]]]) -> dict[str, Any]:
    """For the manifest: the mean of each reward (None where nothing is rated), and for rewards with unrated answers
    their number. `columns` has the values of each reward in parts. Warns of a reward that rates nothing.

    Sums are taken part by part: another order would round otherwise, and change the digest of the manifest.
    """
    means: dict[str, float | None] = {}
    unrated: dict[str, int] = {}
    for name, parts in columns.items():
        count, rated, total = 0, 0, 0.0
        for part in parts:
            values = [value for value in part if value is not None]
            count, rated, total = count + len(part), rated + len(values), total + sum(values)
        means[name] = total / rated if rated else None
        if rated < count:
            unrated[name] = count - rated
        if count and not rated:
            log.warn(f"reward {name} rated none of {count} answers: the reasons are in {reward_folder(name)} (detail)")
    return {"mean_reward": means, **({"unrated": unrated} if unrated else {})}


def summary(totals: Mapping[str, Any]) -> list[str]:
    """A line for every reward with answers: its mean, and the number of unrated answers."""
    lines: list[str] = []
    for name, mean in totals["mean_reward"].items():
        unrated = totals.get("unrated", {}).get(name, 0)
        if mean is not None:
            lines.append(f"  reward {name}: mean {mean:.3f}" + (f", {unrated} answers not rated" if unrated else ""))
        elif unrated:
            lines.append(f"  WARNING: reward {name} rated no answer, {unrated} are without a rating")
    return lines


def _bounded(score: Scored) -> Scored:
    if score.reward is None or abs(score.reward) <= LARGEST_REWARD:
        return score
    return Scored(
        None, "crash", f"a reward of {score.reward:g} is no number to compute with: at most {LARGEST_REWARD:g}"
    )


def reward_folder(name: str) -> str:
    """The name of the dataset that holds a reward."""
    return f"rewards/{name}"


def load_rewards(
    names: Sequence[str], tables: Mapping[str, Settings] = MappingProxyType({})
) -> tuple[dict[str, RewardFunction], dict[str, str]]:
    """Reward functions by name, and the identity of each for the fingerprint of a run."""
    return ({n: rewards.load(n, tables) for n in names}, {f"reward {n}": rewards.identity(n, tables) for n in names})
