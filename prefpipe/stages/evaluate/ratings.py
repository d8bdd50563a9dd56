"""Further rewards of answers that are committed already: rewards/NAME/KEY, where KEY stands for its settings."""

from collections.abc import Mapping

from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.rewards import rating
from prefpipe.rewards.base import RewardFunction
from prefpipe.schemas import Reward, to_table
from prefpipe.stages.evaluate import measures
from prefpipe.stages.evaluate.answers import Answers, key, to_rate

Rewards = dict[str, float | None]  # by completion_id


def fill(config: EvaluateConfig, answers: Answers, name: str, function: RewardFunction, identity: str) -> str:
    """Rate every answer that this reward has not rated yet. Returns the dataset."""
    dataset = f"{rating.reward_folder(name)}/{key(identity)}"
    for index, answered in answers.with_prompts(answers.lacking(dataset)):
        scores = rating.rate(to_rate(config, answers.task, answered), function, name)
        rows = [
            Reward(row.completion_id, name, score.reward, score.status, score.detail)
            for (_, row), score in zip(answered, scores, strict=True)
        ]
        answers.run.write_part(dataset, Reward, index, to_table(Reward, rows), answers.rows_of(index))
    return dataset


def totals(answers: Answers, datasets: Mapping[str, str]) -> dict[str, dict[str, dict[str, float]]]:
    """The mean of every reward by decoding, with its interval: of the deciding one from the answers, of the others from
    their datasets, by name."""
    rewards = {name: _read(answers, dataset) for name, dataset in datasets.items()}
    grouped: dict[str, dict[str, dict[str, list[float | None]]]] = {}
    for row in (row for rows in answers.shards() for row in rows):
        values = {row.name: row.reward, **{name: table[row.completion_id] for name, table in rewards.items()}}
        for name, value in values.items():
            by_prompt = grouped.setdefault(name, {}).setdefault(row.decoding, {})
            by_prompt.setdefault(row.prompt_id, []).append(value)
    return {
        name: {decoding: measures.mean_reward(of.values()).alone("mean") for decoding, of in table.items()}
        for name, table in grouped.items()
    }


def _read(answers: Answers, dataset: str) -> Rewards:
    rewards: Rewards = {}
    for index in range(answers.num_shards):
        part = answers.run.read_part(dataset, Reward, index, ["completion_id", "reward"])
        rewards |= dict(zip(part["completion_id"].to_pylist(), part["reward"].to_pylist(), strict=True))
    return rewards
