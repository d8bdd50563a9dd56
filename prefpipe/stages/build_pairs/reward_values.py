"""The reward of every completion, raw or standardised: a reward that the inputs hold, or a sum of several; its spread.

A part is a reward in the sum. Its values are the column `part.I` of the keys, and `rated.I` says whether the inputs
have a row for the completion. The term `term.I` is what the part adds to the sum.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from pathlib import Path

import polars as pl
import polars.selectors as cs

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.config.reward_sum import RewardSum, parse
from prefpipe.errors import DataError
from prefpipe.runs import manifests, store
from prefpipe.schemas import Completion, Reward
from prefpipe.stages.build_pairs.filters import standard_deviation
from prefpipe.stages.build_pairs.partitions import Files, file_and_row, scan


@dataclass(frozen=True)
class Rewards:
    """The sum of rewards, the files of each part by run, and how parts are scaled. `moments`: mean and standard
    deviation of each part over the run, for standardised parts."""

    total: RewardSum
    files: Mapping[str, Files]
    scale: str = "raw"
    moments: Mapping[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])

    @property
    def is_sum(self) -> bool:
        """Whether the reward is more than the plain values of one part."""
        return not self.total.is_plain or self.scale != "raw"


def chosen_reward(config: BuildPairsConfig) -> RewardSum:
    """The reward in the settings, as a sum of rewards that the inputs hold. Raises UsageError as `parse` does."""
    return parse(config.reward, sorted({name for run in _runs(config) for name in _names(run)}))


def open_rewards(config: BuildPairsConfig) -> Rewards:
    """The files of every part, checked. A run in reward_runs holds at least one part, a run in completions all of them.

    Raises MissingInputError for a run without the parts, DataError for a damaged file.
    """
    total, runs = chosen_reward(config), _runs(config)
    held = {run: _names(run) for run in runs}
    files: dict[str, Files] = {}
    for name in total.weights:
        readers = [r for r in runs if name in held[r] or not config.reward_runs or not held[r] & total.weights.keys()]
        files[name] = [store.scannable_files(run, f"rewards/{name}", Reward) for run in readers]
    rewards = Rewards(total, files, config.reward_scale)
    return rewards if config.reward_scale != "run" else Rewards(total, files, "run", _moments(rewards))


def read(files: Files) -> pl.LazyFrame:
    """completion_id and reward of a part."""
    return scan(files, Reward).select("completion_id", "reward")


def join(keys: pl.DataFrame, rated: Sequence[pl.LazyFrame], rewards: Rewards) -> tuple[pl.DataFrame, list[int]]:
    """`keys` with part.I (a reward, or null) and rated.I (whether there is a row), and the number of completions that
    each part rates. `rated` comes from `read`, by part. Raises DataError when a completion has two different rewards of
    a part."""
    counts: list[int] = []
    for number, (frame, files) in enumerate(zip(rated, rewards.files.values(), strict=True)):
        once = _once(frame, files).collect()
        counts.append(once.height)
        names = {"reward": f"part.{number}", "rated": f"rated.{number}"}
        keys = keys.join(once.rename(names), on="completion_id", how="left")
    return keys.with_columns(cs.starts_with("rated.").fill_null(value=False)), counts


def with_reward(keys: pl.DataFrame, rewards: Rewards) -> pl.DataFrame:
    """`keys` (part.I, prompt_id, completion_id) with the column `reward`, null where a part is null, and the terms of a
    sum. Raises DataError for a value that is not a finite number."""
    for files, part in zip(rewards.files.values(), _parts(rewards), strict=True):
        wrong = keys.filter(pl.col(part).is_not_null() & ~pl.col(part).is_finite())
        if wrong.height:
            place = file_and_row(files, pl.col("completion_id") == wrong["completion_id"][0])
            raise DataError(
                f"{place}: column 'reward' is {wrong[part][0]} ({wrong.height} such rows)",
                "a reward is a finite number, or null when there is none",
            )
    if not rewards.is_sum:
        return keys.with_columns(reward=pl.col("part.0"))
    whole = pl.all_horizontal(pl.col(part).is_not_null() for part in _parts(rewards))
    # One order, so that the mean of a prompt has the same bits in every run.
    ordered = _by_prompt(keys)
    terms = ordered.with_columns(
        (weight * _scaled(rewards, name, pl.when(whole).then(part))).alias(term)
        for (name, weight), part, term in zip(
            rewards.total.weights.items(), _parts(rewards), _terms(rewards), strict=True
        )
    )
    return terms.drop("prompt").with_columns(reward=reduce(add, map(pl.col, _terms(rewards))) + rewards.total.constant)


def why_none(rewards: Rewards) -> pl.Expr:
    """The detail for the reason no_reward: with a sum, the names of the parts that are null."""
    if not rewards.is_sum:
        return pl.lit("the reward is null or missing")
    null = [
        pl.when(pl.col(part).is_null()).then(pl.lit(name))
        for name, part in zip(rewards.files, _parts(rewards), strict=True)
    ]
    return pl.format("null or missing: {}", pl.concat_str(null, separator=", ", ignore_nulls=True))


def count_null(keys: pl.DataFrame, rewards: Rewards) -> Counter[str]:
    """Completions without a value, by part."""
    return Counter({name: keys[part].null_count() for name, part in zip(rewards.files, _parts(rewards), strict=True)})


def count_rated(keys: pl.DataFrame, rewards: Rewards) -> Counter[str]:
    """Completions for which the inputs have a row, by part."""
    return Counter({name: int(keys[f"rated.{number}"].sum()) for number, name in enumerate(rewards.files)})


def terms_of(candidates: pl.DataFrame, rewards: Rewards) -> pl.DataFrame:
    """prompt_id, completion_id and terms of candidates; no columns where the reward is not a sum."""
    return candidates.select("prompt_id", "completion_id", *_terms(rewards)) if rewards.is_sum else pl.DataFrame()


def check_match(
    rewards: Rewards, completions: Files, num_rewards: Mapping[str, int], num_rated: Mapping[str, int]
) -> None:
    """Raise DataError when a part has more rows (`num_rewards`) than completions that it rates (`num_rated`)."""
    for name, files in rewards.files.items():
        total = num_rewards[name]
        if total == num_rated[name]:
            continue
        foreign = scan(files, Reward).join(scan(completions, Completion), on="completion_id", how="anti")
        first = foreign.select(pl.col("completion_id").min()).collect().item()
        place = file_and_row(files, pl.col("completion_id") == first)
        raise DataError(
            f"{total - num_rated[name]} rewards belong to no completion of these runs; "
            f"{place}: column 'completion_id' is {first}",
            "pass the runs they were made for with --completions",
        )


@dataclass(frozen=True)
class Spread:
    """How much a term varies among the candidates.

    sd, sd_in_prompt: standard deviation over all candidates, and around the mean of each prompt
    share: share of the square of sd_in_prompt in its sum over all terms
    missing: completions without a value of the part
    """

    name: str
    weight: float
    sd: float
    sd_in_prompt: float
    share: float
    missing: int

    def __str__(self) -> str:
        missing = f", missing for {self.missing}" if self.missing else ""
        return (
            f"{self.weight:g}*{self.name} sd {self.sd:.3g}, in a prompt {self.sd_in_prompt:.3g} "
            f"({self.share:.0%} of the variance){missing}"
        )


def spreads(terms: pl.DataFrame, rewards: Rewards, missing: Mapping[str, int]) -> list[Spread]:
    """The spread of every term of a sum. `terms` comes from `terms_of`."""
    ordered = _by_prompt(terms)
    around = ordered.select(pl.col(t) - pl.col(t).mean().over("prompt") for t in _terms(rewards))
    squares = {t: math.fsum(v * v for v in around[t].to_list()) for t in _terms(rewards)}
    count, total = max(terms.height, 1), math.fsum(squares.values())
    return [
        Spread(
            name=name,
            weight=weight,
            sd=standard_deviation(ordered[term].to_list()),
            sd_in_prompt=math.sqrt(squares[term] / count),
            share=squares[term] / total if total else 0.0,
            missing=missing[name],
        )
        for (name, weight), term in zip(rewards.total.weights.items(), _terms(rewards), strict=True)
    ]


def _runs(config: BuildPairsConfig) -> list[Path]:
    return [Path(p) for p in config.reward_runs or config.completions]


def _names(run: Path) -> set[str]:
    """The names of the rewards that a run holds."""
    folder = "rewards/"
    return {n.removeprefix(folder) for n in manifests.datasets(store.read_manifest(run)) if n.startswith(folder)}


def _parts(rewards: Rewards) -> list[str]:
    return [f"part.{number}" for number in range(len(rewards.files))]


def _terms(rewards: Rewards) -> list[str]:
    return [f"term.{number}" for number in range(len(rewards.files))]


def _by_prompt(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows in order of prompt_id and completion_id, with a number for each prompt, by which windows group fast."""
    return rows.sort("prompt_id", "completion_id").with_columns(prompt=pl.col("prompt_id").rle_id())


def _once(rows: pl.LazyFrame, files: Files) -> pl.LazyFrame:
    """completion_id, reward and rated (true), once per completion. Raises DataError for two different rewards of
    one."""
    if len(files) == 1:
        return rows.with_columns(rated=pl.lit(True))  # noqa: FBT003  (a column of true)
    once = rows.group_by("completion_id").agg(pl.col("reward").max(), low=pl.col("reward").min())
    differing = once.filter(pl.col("reward") != pl.col("low")).collect(engine="streaming")
    if differing.height:
        first = differing.sort("completion_id").row(0, named=True)
        place = file_and_row(files, pl.col("completion_id") == first["completion_id"])
        raise DataError(
            f"{differing.height} completions have two rewards of this name; {place}: completion_id "
            f"{first['completion_id']} has {first['low']} and {first['reward']}",
            "pass one run per reward with --reward-runs",
        )
    return once.select("completion_id", "reward", rated=pl.lit(True))  # noqa: FBT003


def _moments(rewards: Rewards) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each part over the completions that have every part. Sums are exact."""
    parts = _parts(rewards)
    frames = [
        _once(read(files), files).select("completion_id", pl.col("reward").alias(part))
        for files, part in zip(rewards.files.values(), parts, strict=True)
    ]
    joined = reduce(lambda one, other: one.join(other, on="completion_id"), frames)
    finite = joined.filter(pl.all_horizontal(pl.col(p).is_finite() for p in parts)).select(parts)
    values = finite.collect(engine="streaming")
    found: dict[str, tuple[float, float]] = {}
    for name, part in zip(rewards.files, parts, strict=True):
        column = values[part].to_list()
        varies = bool(column) and min(column) < max(column)
        found[name] = (math.fsum(column) / len(column), standard_deviation(column)) if varies else (0.0, 0.0)
    return found


def _scaled(rewards: Rewards, name: str, value: pl.Expr) -> pl.Expr:
    """The values of a part as they enter the sum. A part without variation is 0 where it is standardised."""
    if rewards.scale == "raw":
        return value
    if rewards.scale == "run":
        mean, sd = rewards.moments[name]
        return (value - mean) / sd if sd else value * 0.0
    varies = (value.max() > value.min()).over("prompt")
    standardised = (value - value.mean().over("prompt")) / value.std(ddof=0).over("prompt")
    return pl.when(varies).then(standardised).otherwise(value * 0.0)
