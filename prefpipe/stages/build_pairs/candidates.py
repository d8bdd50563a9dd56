"""Completions joined with their rewards and cut into partitions by prompt; which of them are candidates for pairs.

Only key columns stay in memory. Texts and token ids are read as a stream to check length and control tokens, and read
again later for the few rows that the rule chose. A partition holds whole prompts, so that later steps need one
partition at a time.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.errors import DataError
from prefpipe.runs import manifests, store
from prefpipe.runs.store import Run
from prefpipe.schemas import Completion, Prompt, RefLogps, Reward
from prefpipe.stages.build_pairs import reward_values, texts
from prefpipe.stages.build_pairs.partitions import (
    Files,
    batches,
    cut,
    file_and_row,
    partition_of,
    parts_of,
    scan,
    sink,
    split,
)
from prefpipe.stages.build_pairs.reward_values import Rewards
from prefpipe.stages.build_pairs.tasks import Map

LEDGER = {"id": pl.String, "reason": pl.String, "detail": pl.String}
_ROWS_PER_PARTITION = 400_000


@dataclass(frozen=True)
class Sources:
    """The Parquet files of every input, by run. `open_sources` checks their digests and columns."""

    completions: Files
    prompts: Files
    rewards: Rewards
    ref_logps: Files
    policy_logps: Files

    @property
    def num_partitions(self) -> int:
        """The number of partitions with about 400,000 rows each, so that key columns of one are small beside the
        memory."""
        return 1 + int(scan(self.completions, Completion).select(pl.len()).collect().item()) // _ROWS_PER_PARTITION


@dataclass(frozen=True)
class Workspace:
    """What building pairs, labels and groups share.

    run_dir: the run directory that the rows are written to
    num_partitions, folder: how many partitions the rows are cut into, and where several of them lie
    run: the `map` that works on partitions, in this process or in several
    """

    config: BuildPairsConfig
    sources: Sources
    run_dir: Run
    num_partitions: int
    folder: Path
    run: Map = map

    def map_filled(self, task: Callable[..., Any], rows: pl.DataFrame, contents: Sequence[Any]) -> list[Any]:
        """The results of `task(number, rows, contents)` for each partition that has rows; `number` counts those."""
        parts = zip(cut(rows, self.num_partitions), contents, strict=True)
        filled = [(number, *part) for number, part in enumerate(part for part in parts if part[0].height)]
        return [*self.run(task, *zip(*filled, strict=True))] if filled else []


def open_sources(config: BuildPairsConfig) -> Sources:
    """Check every input file. Raises MissingInputError for a missing run or dataset, DataError for a damaged file."""
    runs = [Path(p) for p in config.completions]
    scored = [Path(p) for p in config.ref_logps] or [
        r for r in runs if "ref_logps" in manifests.datasets(store.read_manifest(r))
    ]
    return Sources(
        completions=[store.scannable_files(r, "completions", Completion) for r in runs],
        prompts=[store.scannable_files(r, "prompts", Prompt) for r in runs],
        rewards=reward_values.open_rewards(config),
        ref_logps=[store.scannable_files(r, "ref_logps", RefLogps) for r in scored],
        policy_logps=[store.scannable_files(Path(r), "ref_logps", RefLogps) for r in config.policy_logps],
    )


def policies(sources: Sources) -> list[str]:
    """The identities of the policies that sampled the completions."""
    names = scan(sources.completions, Completion).select(pl.col("policy").unique()).collect(engine="streaming")
    return sorted(names["policy"].to_list())


def prompts(sources: Sources) -> pl.LazyFrame:
    """prompt_id and messages of every prompt; a prompt that several runs hold has several rows."""
    return scan(sources.prompts, Prompt).select("prompt_id", "messages")


def thinking(sources: Sources) -> dict[str, float]:
    """Counts of reasoning in completions of one turn: how many begin with reasoning, and the mean tokens of their
    reasoning and of the whole completion. Empty where no completion has reasoning."""
    tokens = pl.col("thinking_tokens")
    if not scan(sources.completions, Completion).select((tokens > 0).any()).collect(engine="streaming").item():
        return {}
    reasoned = scan(sources.completions, Completion).filter(tokens > 0, pl.col("loss_mask").is_null())
    length = pl.col("token_ids").list.len()
    found = reasoned.select(completions=pl.len(), mean_tokens=tokens.mean(), mean_of=length.mean())
    (row,) = found.collect(engine="streaming").to_dicts()
    return row if row["completions"] else {}


def read(
    sources: Sources, config: BuildPairsConfig, count: int, folder: Path, run: Map = map
) -> tuple[list[pl.LazyFrame], Counter[str]]:
    """Key columns of every completion with its rewards, in `count` partitions of whole prompts; and for each part of
    the reward the number of completions that it rates.

    Columns: prompt_id, completion_id, finish_reason, num_tokens, part.I (a reward, or null) and rated.I (whether the
    inputs have a row for it), fault (why the text cannot be a candidate, or null), run. Completions and rewards are
    first cut by completion id, so that a join has 1/`count` of both in memory. Raises DataError when a completion has
    two different rewards of one name.
    """
    by_completion = partition_of(count, "completion_id")
    completions = [
        scan(batch, Completion).select(
            "prompt_id",
            "completion_id",
            "finish_reason",
            "run",
            num_tokens=_answer_tokens(),
            fault=_fault(config),
            partition=by_completion,
        )
        for batch in batches(sources.completions)
    ]
    keys = split(completions, count, folder / "completions", run)
    rated = [
        split(
            [reward_values.read(batch).with_columns(partition=by_completion) for batch in batches(files)],
            count,
            folder / f"rewards.{number}",
            run,
        )
        for number, files in enumerate(sources.rewards.files.values())
    ]
    of_partition = ([part[number] for part in rated] for number in range(count))
    num_rewards = Counter[str]()
    joined: list[pl.DataFrame] = []
    join = partial(_join, sources.rewards, count, folder / "joined")
    for frame, counts in run(join, range(count), keys, of_partition):
        num_rewards.update(dict(zip(sources.rewards.files, counts, strict=True)))
        joined.append(frame)
    if count == 1:
        return [joined[0].lazy()], num_rewards
    return parts_of(joined[0].schema, count, folder / "joined"), num_rewards


def _join(
    rewards: Rewards, count: int, folder: Path, number: int, keys: pl.LazyFrame, rated: Sequence[pl.LazyFrame]
) -> tuple[pl.DataFrame, list[int]]:
    """One partition of completions with its rewards, see `reward_values.join`. With several partitions the rows are
    written to files by prompt, and the frame that is returned is empty."""
    joined, counts = reward_values.join(keys.collect(), rated, rewards)
    if count == 1:
        return joined, counts
    sink(joined.lazy().with_columns(partition=partition_of(count)), folder / str(number))
    return joined.clear(), counts


@dataclass(frozen=True)
class CandidatePartition:
    """The candidates of one partition (key columns) and the ledger of its other completions, with counts.

    num_in, num_prompts: completions and prompts of the partition
    num_rated, num_null: by part of the reward, completions that have a row, and of these those without a value
    terms: the terms of the reward of each candidate, where it is a sum
    """

    candidates: pl.DataFrame
    num_candidates: int
    ledger: pl.DataFrame
    num_in: int
    num_prompts: int
    num_rated: Counter[str]
    num_null: Counter[str]
    terms: pl.DataFrame


def select(
    keys: pl.DataFrame, dropped_prompts: pl.DataFrame, sources: Sources, config: BuildPairsConfig
) -> CandidatePartition:
    """Divide a partition of `read` into candidates and ledger rows; every completion is in exactly one of the two.

    A completion that several runs hold counts once. Raises DataError for an id that occurs twice in one run or belongs
    to two different completions, and for a reward that is not a finite number.
    """
    keys = _without_copies(keys, sources)
    keys = reward_values.with_reward(keys, sources.rewards)
    keys = keys.join(dropped_prompts, on="prompt_id", how="left")
    no_reward = pl.col("reward").is_null()
    judged = keys.with_columns(
        reason=pl.coalesce(pl.col("reason"), pl.when(no_reward).then(pl.lit("no_reward")), pl.col("fault")),
        detail=pl.coalesce(
            pl.format("prompt {}: {}", "prompt_id", "detail"),
            pl.when(no_reward).then(reward_values.why_none(sources.rewards)),
            pl.format("{} tokens", "num_tokens"),
        ),
        reward=pl.col("reward") - config.length_penalty * pl.col("num_tokens"),
    )
    ledger = judged.filter(pl.col("reason").is_not_null()).select(
        pl.col("completion_id").alias("id"), "reason", "detail"
    )
    kept = judged.filter(pl.col("reason").is_null())
    return CandidatePartition(
        kept.select("prompt_id", "completion_id", "reward", "finish_reason", "num_tokens"),
        kept.height,
        ledger,
        keys.height,
        keys["prompt_id"].n_unique(),
        reward_values.count_rated(keys, sources.rewards),
        reward_values.count_null(keys, sources.rewards),
        reward_values.terms_of(kept, sources.rewards),
    )


def _answer_tokens() -> pl.Expr:
    """Tokens of a completion without those of its reasoning."""
    return pl.col("token_ids").list.len() - pl.col("thinking_tokens").fill_null(0).cast(pl.UInt32)


def _fault(config: BuildPairsConfig) -> pl.Expr:
    """The first reason in text or length why a completion cannot be a candidate, or null."""
    text, length = pl.col("text"), _answer_tokens()
    reason = pl.when(text.str.strip_chars() == "").then(pl.lit("empty"))
    if config.special_tokens == "drop":
        reason = reason.when(text.str.contains(texts.CONTROL_TOKENS)).then(pl.lit("special_tokens"))
    if config.min_tokens:
        reason = reason.when(length < config.min_tokens).then(pl.lit("too_short"))
    if config.max_tokens:
        reason = reason.when(length > config.max_tokens).then(pl.lit("too_long"))
    if config.refusals == "drop":
        refuses = text.map_elements(texts.is_refusal, return_dtype=pl.Boolean)
        reason = reason.when(refuses).then(pl.lit("refusal"))
    if config.max_repetition < 1:
        share = text.map_elements(texts.repetition, return_dtype=pl.Float64)
        reason = reason.when(share > config.max_repetition).then(pl.lit("repetition"))
    if config.languages:
        known = text.map_elements(texts.language_in(config.languages), return_dtype=pl.Boolean)
        reason = reason.when(~known).then(pl.lit("language"))
    return reason


def _without_copies(keys: pl.DataFrame, sources: Sources) -> pl.DataFrame:
    """Each completion once. Raises DataError for an id that occurs twice in one run, or with different content."""
    unique = keys.unique("completion_id", keep="first")
    if unique.height == keys.height:
        return keys
    content = pl.struct("prompt_id", "finish_reason", "num_tokens")
    counts = keys.group_by("completion_id").agg(
        rows=pl.len(), runs=pl.col("run").n_unique(), contents=content.n_unique()
    )
    wrong = counts.filter((pl.col("rows") > pl.col("runs")) | (pl.col("contents") > 1)).sort("completion_id")
    if wrong.is_empty():
        return unique
    first = wrong.row(0, named=True)
    wanted = pl.col("completion_id") == first["completion_id"]
    # Two rewards of a completion double its row too: find out which of the two datasets has it twice.
    repeated = scan(sources.completions, Completion).filter(wanted).select(pl.len()).collect().item() > first["runs"]
    if repeated or first["contents"] > 1:
        place = file_and_row(sources.completions, wanted)
    else:
        place = next(filter(None, (_second_row(files, wanted) for files in sources.rewards.files.values())), "")
    raise DataError(
        f"{place}: column 'completion_id': {first['completion_id']} is there twice ({wrong.height} such ids)",
        "an id stands once in a run, and always for the same completion: remove the copies",
    )


def _second_row(files: Files, wanted: pl.Expr) -> str:
    """File and row of the last row that `wanted` selects; empty where it selects at most one row."""
    several = scan(files, Reward).filter(wanted).select(pl.len()).collect().item() > 1
    return file_and_row(files, wanted) if several else ""
