"""Completions joined with their rewards, in partitions by prompt, and the completions that are no candidates.

Only key columns are kept: texts and token ids are looked at while they stream by (length, control tokens) and read
again later for the few rows that were chosen. A partition holds whole prompts, so that everything that follows works
on one partition at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.errors import DataError
from prefpipe.runs import fsio, store
from prefpipe.schemas import Completion, Prompt, RefLogps, Reward
from prefpipe.stages.build_pairs import texts

LEDGER = {"id": pl.String, "reason": pl.String, "detail": pl.String}
_ROWS_PER_PARTITION = 400_000
_BYTES_AT_ONCE = 512 << 20
Files = Sequence[Sequence[Path]]  # of every run


@dataclass(frozen=True)
class Sources:
    """The files of every input, by run; digests and columns are checked when they are opened."""

    completions: Files
    prompts: Files
    rewards: Files
    ref_logps: Files
    policy_logps: Files

    @property
    def num_partitions(self) -> int:
        """How many partitions these completions need so that one fits into memory many times."""
        return 1 + int(scan(self.completions).select(pl.len()).collect().item()) // _ROWS_PER_PARTITION


def open_sources(config: BuildPairsConfig) -> Sources:
    """Check every input file. Raises MissingInputError or DataError for what is not there or not as it was written."""
    runs, rated = ([Path(p) for p in names] for names in (config.completions, config.reward_runs or config.completions))
    scored = [Path(p) for p in config.ref_logps] or [
        r for r in runs if "ref_logps" in store.datasets(store.read_manifest(r))
    ]
    return Sources(
        completions=[store.scannable_files(r, "completions", Completion) for r in runs],
        prompts=[store.scannable_files(r, "prompts", Prompt) for r in runs],
        rewards=[store.scannable_files(r, f"rewards/{config.reward}", Reward) for r in rated],
        ref_logps=[store.scannable_files(r, "ref_logps", RefLogps) for r in scored],
        policy_logps=[store.scannable_files(Path(r), "ref_logps", RefLogps) for r in config.policy_logps],
    )


def policies(sources: Sources) -> list[str]:
    """The policies that the completions were sampled from."""
    found = scan(sources.completions).select(pl.col("policy").unique()).collect(engine="streaming")
    return sorted(found["policy"].to_list())


def scan(files: Files) -> pl.LazyFrame:
    """A dataset of several runs, with the number of the run beside it."""
    return pl.concat(
        pl.scan_parquet(list(own)).with_columns(run=pl.lit(number, pl.UInt16)) for number, own in enumerate(files)
    )


def partition_of(count: int) -> pl.Expr:
    """The partition of a prompt."""
    return (pl.col("prompt_id").hash(0) % count).cast(pl.UInt16)


def split(frames: Sequence[pl.LazyFrame], count: int, folder: Path) -> list[pl.LazyFrame]:
    """Frames of the same columns cut by their column `partition` (0 to count - 1).

    In memory when there is one partition, in files otherwise, one frame after the other: a partitioned sink holds most
    of what goes through it.
    """
    if count == 1:
        return [pl.concat(f.drop("partition").collect(engine="streaming") for f in frames).lazy()]
    fsio.make_dirs(folder)
    schema = frames[0].drop("partition").collect_schema()
    with fsio.storage_errors(folder):
        for number, frame in enumerate(frames):
            by = pl.PartitionBy(folder / str(number), key="partition", include_key=False)
            frame.sink_ipc(by, compression="lz4", mkdir=True)
    parts = [sorted(folder.glob(f"*/partition={number}/*")) for number in range(count)]
    return [pl.scan_ipc(files) if files else pl.LazyFrame(schema=schema) for files in parts]


def pieces(files: Files) -> list[Files]:
    """The files in groups of up to 512 MiB, so that one group's rows fit into memory many times."""
    groups: list[list[Path]] = [[]]
    size = 0
    for path in (path for own in files for path in own):
        if groups[-1] and size + path.stat().st_size > _BYTES_AT_ONCE:
            groups.append([])
            size = 0
        groups[-1].append(path)
        size += path.stat().st_size
    return [[group] for group in groups]


def read(sources: Sources, config: BuildPairsConfig, count: int, folder: Path) -> list[pl.LazyFrame]:
    """Key columns of every completion with its reward, cut into partitions.

    Columns: prompt_id, completion_id, finish_reason, num_tokens, reward (null without one), rated (whether a row of the
    rewards names it), fault (why the text is no candidate, or null), run. Raises DataError for rewards that do not fit.
    """
    completions = scan(sources.completions).select(
        "prompt_id",
        "completion_id",
        "finish_reason",
        "run",
        num_tokens=pl.col("token_ids").list.len(),
        fault=_fault(config),
    )
    rewards = _rewards(sources)
    keys = completions.join(rewards, on="completion_id", how="left").with_columns(
        rated=pl.col("rated").fill_null(value=False), partition=partition_of(count)
    )
    return split([keys], count, folder)


@dataclass(frozen=True)
class Settled:
    """One partition: its candidates, ledger rows of the other completions, and counts."""

    candidates: pl.DataFrame
    ledger: pl.DataFrame
    num_in: int
    num_rated: int
    num_prompts: int


def settle(keys: pl.DataFrame, dropped_prompts: pl.DataFrame, sources: Sources, config: BuildPairsConfig) -> Settled:
    """Candidates and ledger rows of one partition of `read`, every completion in exactly one of them.

    A completion that stands in several runs counts once. Raises DataError for ids that are there twice in one run, or
    with other content, and for rewards that are no finite number.
    """
    keys = _once(keys, sources)
    wrong = keys.filter(pl.col("reward").is_not_null() & ~pl.col("reward").is_finite())
    if wrong.height:
        place = _place(sources.rewards, pl.col("completion_id") == wrong["completion_id"][0])
        raise DataError(
            f"{place}: column 'reward' is {wrong['reward'][0]} ({wrong.height} such rows)",
            "a reward is a finite number, or null when there is none",
        )
    keys = keys.join(dropped_prompts, on="prompt_id", how="left")
    no_reward = pl.col("reward").is_null()
    judged = keys.with_columns(
        reason=pl.coalesce(pl.col("reason"), pl.when(no_reward).then(pl.lit("no_reward")), pl.col("fault")),
        detail=pl.coalesce(
            pl.format("prompt {}: {}", "prompt_id", "detail"),
            pl.when(no_reward).then(pl.lit("the reward is null or missing")),
            pl.format("{} tokens", "num_tokens"),
        ),
        reward=pl.col("reward") - config.length_penalty * pl.col("num_tokens"),
    )
    ledger = judged.filter(pl.col("reason").is_not_null()).select(
        pl.col("completion_id").alias("id"), "reason", "detail"
    )
    candidates = judged.filter(pl.col("reason").is_null()).select(
        "prompt_id", "completion_id", "reward", "finish_reason", "num_tokens"
    )
    return Settled(candidates, ledger, keys.height, int(keys["rated"].sum()), keys["prompt_id"].n_unique())


def check_foreign(sources: Sources, matched: int) -> None:
    """Every row of the rewards must belong to a completion of these runs; `matched` of their ids were found."""
    total = int(_rewards(sources).select(pl.len()).collect(engine="streaming").item())
    if total == matched:
        return
    foreign = scan(sources.rewards).join(scan(sources.completions), on="completion_id", how="anti")
    first = foreign.select(pl.col("completion_id").min()).collect().item()
    place = _place(sources.rewards, pl.col("completion_id") == first)
    raise DataError(
        f"{total - matched} rewards belong to no completion of these runs; {place}: column 'completion_id' is {first}",
        "pass the runs they were made for with --completions",
    )


def _fault(config: BuildPairsConfig) -> pl.Expr:
    """The first reason why a completion is no candidate, from its own content."""
    text, length = pl.col("text"), pl.col("token_ids").list.len()
    reason = pl.when(text.str.strip_chars() == "").then(pl.lit("empty"))
    if config.special_tokens == "drop":
        reason = reason.when(text.str.contains(texts.CONTROL_TOKENS)).then(pl.lit("special_tokens"))
    if config.min_tokens:
        reason = reason.when(length < config.min_tokens).then(pl.lit("too_short"))
    if config.max_tokens:
        reason = reason.when(length > config.max_tokens).then(pl.lit("too_long"))
    if config.refusals == "drop":
        reason = reason.when(text.str.contains(texts.REFUSAL)).then(pl.lit("refusal"))
    if config.max_repetition < 1:
        share = text.map_elements(texts.repetition, return_dtype=pl.Float64)
        reason = reason.when(share > config.max_repetition).then(pl.lit("repetition"))
    if config.languages:
        known = text.map_elements(texts.language_in(config.languages), return_dtype=pl.Boolean)
        reason = reason.when(~known).then(pl.lit("language"))
    return reason


def _rewards(sources: Sources) -> pl.LazyFrame:
    """completion_id, reward and rated, once per completion. Two different rewards of one completion are an error."""
    rows = scan(sources.rewards).select("completion_id", "reward")
    if len(sources.rewards) == 1:
        return rows.with_columns(rated=pl.lit(True))  # noqa: FBT003  (a column of true)
    once = rows.group_by("completion_id").agg(pl.col("reward").max(), low=pl.col("reward").min())
    differing = once.filter(pl.col("reward") != pl.col("low")).collect(engine="streaming")
    if differing.height:
        first = differing.sort("completion_id").row(0, named=True)
        place = _place(sources.rewards, pl.col("completion_id") == first["completion_id"])
        raise DataError(
            f"{differing.height} completions have two rewards of this name; {place}: completion_id "
            f"{first['completion_id']} has {first['low']} and {first['reward']}",
            "pass one run per reward with --reward-runs",
        )
    return once.select("completion_id", "reward", rated=pl.lit(True))  # noqa: FBT003


def _once(keys: pl.DataFrame, sources: Sources) -> pl.DataFrame:
    once = keys.unique("completion_id", keep="first")
    if once.height == keys.height:
        return keys
    content = pl.struct("prompt_id", "finish_reason", "num_tokens")
    counts = keys.group_by("completion_id").agg(
        rows=pl.len(), runs=pl.col("run").n_unique(), contents=content.n_unique()
    )
    wrong = counts.filter((pl.col("rows") > pl.col("runs")) | (pl.col("contents") > 1)).sort("completion_id")
    if wrong.is_empty():
        return once
    first = wrong.row(0, named=True)
    wanted = pl.col("completion_id") == first["completion_id"]
    # A reward that is there twice doubles the row as well.
    twice = scan(sources.completions).filter(wanted).select(pl.len()).collect().item() > first["runs"]
    place = _place(sources.completions if twice or first["contents"] > 1 else sources.rewards, wanted)
    raise DataError(
        f"{place}: column 'completion_id': {first['completion_id']} is there twice ({wrong.height} such ids)",
        "an id stands once in a run, and always for the same completion: remove the copies",
    )


def _place(files: Files, wanted: pl.Expr) -> str:
    """File and row of the last row that fits: of copies, the one that is too much."""
    found = ""
    for path in (path for own in files for path in own):
        rows = pl.scan_parquet(path, row_index_name="row").filter(wanted).select(pl.col("row").max()).collect()
        if rows.item() is not None:
            found = f"{path}, row {rows.item()}"
    return found


def cut(frame: pl.DataFrame, count: int) -> list[pl.DataFrame]:
    """The rows of each partition."""
    partition = frame.select(partition_of(count)).to_series()
    return [frame.filter(partition == number) for number in range(count)]
