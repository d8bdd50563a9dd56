"""Candidates -> ranked groups for listwise losses: distinct rewards, distinct texts, best first."""

from collections.abc import Sequence

import polars as pl

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.schemas import RankedGroup
from prefpipe.stages.build_pairs import filters, label_rules, output_rows, texts
from prefpipe.stages.build_pairs.accounting import Level
from prefpipe.stages.build_pairs.candidates import cut
from prefpipe.stages.build_pairs.job import Built, Job, counts


def by_keys(candidates: pl.DataFrame, config: BuildPairsConfig) -> pl.DataFrame:
    """Candidates best first, with a reason: tie (a reward that stands higher already), truncated_chosen (cut off, and
    above another), truncated_rejected (cut off, and last)."""
    ordered = candidates.sort("prompt_id", "reward", "completion_id", descending=[False, True, False])
    tie = pl.col("reward") == pl.col("reward").shift(1).over("prompt_id")
    judged = ordered.with_columns(reason=pl.when(tie).then(pl.lit("tie")))
    left = pl.col("reason").is_null()
    last = (left.cast(pl.UInt32).cum_sum(reverse=True).over("prompt_id") == 1) & left
    cut = pl.col("finish_reason") == "length"
    reason = pl.when(~left).then("reason")
    if config.truncated_chosen == "drop":
        reason = reason.when(cut & ~last).then(pl.lit("truncated_chosen"))
    if config.truncated_rejected == "drop":
        reason = reason.when(cut & last).then(pl.lit("truncated_rejected"))
    return alone(judged.with_columns(reason=reason))


def by_content(ranked: pl.DataFrame) -> pl.DataFrame:
    """Ranked completions (with text), and a reason: identical_text for what stands higher already."""
    normal = ranked.with_columns(normal=texts.normal("text"))
    again = pl.int_range(pl.len()).over("prompt_id", "normal") > 0
    return alone(normal.with_columns(reason=pl.when(again).then(pl.lit("identical_text"))).drop("normal"))


def alone(judged: pl.DataFrame) -> pl.DataFrame:
    """A completion that is left alone in its prompt is no group."""
    left = pl.col("reason").is_null()
    single = left & (left.sum().over("prompt_id") == 1)
    return judged.with_columns(reason=pl.when(single).then(pl.lit("too_few")).otherwise("reason"))


def build(job: Job, candidates: Sequence[pl.DataFrame]) -> Built:
    """Write ranked groups, one part per partition, and say what became of the other completions."""
    judged = by_keys(pl.concat(candidates), job.config)
    useful = filters.kept(judged)
    contents = output_rows.fetch(
        job.sources, useful.select("prompt_id", "completion_id"), job.num_partitions, job.folder
    )
    ledgers = [label_rules.ledger(judged)]
    num_groups = num_completions = number = 0
    for partition, own in enumerate(cut(useful, job.num_partitions)):
        content = contents.of(partition)
        compared = by_content(
            own.join(content.select("completion_id", "text"), on="completion_id", maintain_order="left")
        )
        ledgers.append(label_rules.ledger(compared))
        kept = filters.kept(compared).drop("text")
        if kept.is_empty():
            continue
        made = output_rows.group_rows(kept, content, contents.prompts_of(partition))
        job.run.write_part("groups", RankedGroup, number, output_rows.to_table(made, RankedGroup))
        number, num_groups, num_completions = number + 1, num_groups + made.height, num_completions + kept.height
    ledger = pl.concat(ledgers)
    level = Level(judged.height, num_completions, counts(ledger))
    totals = {"groups": num_groups, "completions_in_groups": num_completions}
    return Built({"ranked": level}, ledger, totals, pl.DataFrame(), pl.DataFrame())
