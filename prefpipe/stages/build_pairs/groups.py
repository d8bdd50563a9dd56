"""Ranked groups for listwise losses: candidates of a prompt, best first, with distinct rewards and distinct texts."""

from collections.abc import Sequence
from functools import partial

import polars as pl

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.runs.store import Run
from prefpipe.schemas import RankedGroup
from prefpipe.stages.build_pairs import filters, label_rules, output_rows, texts
from prefpipe.stages.build_pairs.accounting import BuildResult, Level, count_reasons
from prefpipe.stages.build_pairs.candidates import Workspace
from prefpipe.stages.build_pairs.partitions import cut


def by_keys(candidates: pl.DataFrame, config: BuildPairsConfig) -> pl.DataFrame:
    """Candidates best first, with a column `reason`: tie (same reward as the candidate above), truncated_chosen (hit
    max_tokens and is above another), truncated_rejected (hit max_tokens and is last), too_few, or null."""
    ordered = candidates.sort("prompt_id", "reward", "completion_id", descending=[False, True, False])
    tie = pl.col("reward") == pl.col("reward").shift(1).over("prompt_id")
    judged = ordered.with_columns(reason=pl.when(tie).then(pl.lit("tie")))
    left = pl.col("reason").is_null()
    last = (left.cast(pl.UInt32).cum_sum(reverse=True).over("prompt_id") == 1) & left
    truncated = pl.col("finish_reason") == "length"
    reason = pl.when(~left).then("reason")
    if config.truncated_chosen == "drop":
        reason = reason.when(truncated & ~last).then(pl.lit("truncated_chosen"))
    if config.truncated_rejected == "drop":
        reason = reason.when(truncated & last).then(pl.lit("truncated_rejected"))
    return _drop_single(judged.with_columns(reason=reason))


def by_content(ranked: pl.DataFrame) -> pl.DataFrame:
    """Ranked completions (with text) with a column `reason`: identical_text (same text as a completion above), too_few,
    or null."""
    normal = ranked.with_columns(normal=texts.normal("text"))
    again = pl.int_range(pl.len()).over("prompt_id", "normal") > 0
    return _drop_single(normal.with_columns(reason=pl.when(again).then(pl.lit("identical_text"))).drop("normal"))


def build(workspace: Workspace, candidates: Sequence[pl.DataFrame]) -> BuildResult:
    """Write ranked groups, one file per partition, and count the completions that are in no group."""
    judged = by_keys(pl.concat(candidates), workspace.config)
    useful = filters.kept(judged)
    contents = output_rows.fetch(workspace, useful.select("prompt_id", "completion_id"), "groups")
    compared = [*workspace.run(_compared, cut(useful, workspace.num_partitions), contents)]
    ledger = pl.concat([label_rules.ledger(judged), *map(label_rules.ledger, compared)])
    kept = pl.concat(filters.kept(part) for part in compared)
    counts = workspace.map_filled(partial(_write, workspace.run_dir), kept, contents)
    num_groups, num_completions = (sum(count[i] for count in counts) for i in (0, 1))
    level = Level(judged.height, num_completions, count_reasons(ledger))
    totals = {"groups": num_groups, "completions_in_groups": num_completions}
    return BuildResult({"ranked": level}, ledger, totals, pl.DataFrame(), pl.DataFrame())


def _compared(ranked: pl.DataFrame, contents: output_rows.Contents) -> pl.DataFrame:
    """`by_content` of one partition, without the texts."""
    texts_of = contents.rows().select("completion_id", "text")
    return by_content(ranked.join(texts_of, on="completion_id", maintain_order="left")).drop("text")


def _write(run_dir: Run, number: int, kept: pl.DataFrame, contents: output_rows.Contents) -> tuple[int, int]:
    """Write the groups of a partition. Returns the number of groups, and of completions in them."""
    rows = output_rows.group_rows(kept, contents.rows(), contents.of_prompts())
    run_dir.write_part("groups", RankedGroup, number, output_rows.to_table(rows, RankedGroup))
    return rows.height, kept.height


def _drop_single(judged: pl.DataFrame) -> pl.DataFrame:
    """Give the reason too_few to a completion that is the only one left of its prompt."""
    left = pl.col("reason").is_null()
    single = left & (left.sum().over("prompt_id") == 1)
    return judged.with_columns(reason=pl.when(single).then(pl.lit("too_few")).otherwise("reason"))
