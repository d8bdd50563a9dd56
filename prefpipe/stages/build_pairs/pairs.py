"""Candidates -> pairs: rule, filters by keys, filters by content, weights, rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.errors import DataError
from prefpipe.schemas import Pair
from prefpipe.stages.build_pairs import data_report, filters, output_rows, pair_rules, trl
from prefpipe.stages.build_pairs.accounting import Level
from prefpipe.stages.build_pairs.candidates import LEDGER, cut
from prefpipe.stages.build_pairs.job import Built, Job, counts
from prefpipe.stages.build_pairs.output_rows import with_weights


@dataclass(frozen=True)
class Found:
    """Pairs that the rule finds in one partition, as key columns, and the prompts in which it finds none."""

    pairs: pl.DataFrame
    ledger: pl.DataFrame
    num_prompts: int


@dataclass(frozen=True)
class Judged:
    """Pairs that all filters keep (key columns), with their contents; ledger rows and counts of the others."""

    pairs: pl.DataFrame
    ledger: pl.DataFrame
    levels: dict[str, Level]
    contents: output_rows.Contents


def find(candidates: pl.DataFrame, config: BuildPairsConfig) -> Found:
    """Apply the rule; a prompt without a pair gets its reason: too_few, tie or no_pair."""
    ranked = pair_rules.rank(candidates)
    pairs = pair_rules.pair_frame(ranked, pair_rules.RULES[config.rule](ranked, config))
    without = ranked.spans.join(pairs.select("prompt_id").unique(), on="prompt_id", how="anti", maintain_order="left")
    reason = (
        pl.when(pl.col("count") < 2)
        .then(pl.lit("too_few"))
        .when(pl.col("ties") == pl.col("count"))
        .then(pl.lit("tie"))
        .otherwise(pl.lit("no_pair"))
    )
    detail = (
        pl.when(pl.col("count") < 2)
        .then(pl.lit("a pair needs two candidates of the prompt"))
        .when(pl.col("ties") == pl.col("count"))
        .then(pl.format("the rewards of all {} candidates are equal", "count"))
        .otherwise(pl.format("rule {} pairs none of {} candidates", pl.lit(config.rule), "count"))
    )
    ledger = without.select(id="prompt_id", reason=reason, detail=detail)
    return Found(pairs, ledger, ranked.spans.height)


def judge(job: Job, found: Sequence[Found]) -> Judged:
    """Filter the pairs of all partitions."""
    pairs = pl.concat(f.pairs for f in found)
    by_keys = filters.by_keys(pairs, job.config, filters.scale(pairs, job.config))
    useful = filters.kept(by_keys)
    contents = output_rows.fetch(job.sources, _used(useful), job.num_partitions, job.folder / "pairs")
    by_content = [
        filters.by_content(output_rows.sides(own, contents.of(number)), job.config).select(
            *by_keys.columns,
            *(f"{s}_{n}" for s in output_rows.SIDES for n in ("ref_logps", "policy_logps")),
            *(pl.col(f"{s}_token_ids").list.last().alias(f"{s}_last") for s in output_rows.SIDES),
        )
        for number, own in enumerate(cut(useful, job.num_partitions))
    ]
    compared = pl.concat(by_content)
    _check_scores(filters.kept(compared), job.config)
    one_sided = filters.end_on_one_side(filters.kept(compared))
    if one_sided:
        raise DataError(one_sided, "the two sides were tokenised differently: score them with one model")
    chosen = filters.subset(
        filters.kept(compared).sort("prompt_id", "chosen_completion_id", "rejected_completion_id"), job.config
    )
    kept = filters.kept(chosen)
    without = pl.concat([pl.DataFrame(schema=LEDGER), *(f.ledger for f in found)])
    dropped = pl.concat(filters.ledger(j.select(by_keys.columns)) for j in (by_keys, compared, chosen))
    num_prompts = sum(f.num_prompts for f in found)
    levels = {
        "prompts": Level(num_prompts, pairs["prompt_id"].n_unique(), counts(without)),
        "pairs": Level(pairs.height, kept.height, counts(dropped)),
    }
    return Judged(kept.select(pairs.columns), pl.concat([without, dropped]), levels, contents)


def build(job: Job, found: Sequence[Found]) -> Built:
    """Write the pairs that are kept, one part per partition, and say what became of the others."""
    judged = judge(job, found)
    weighted = with_weights(judged.pairs, job.config)
    facts: list[pl.DataFrame] = []
    samples: list[pl.DataFrame] = []
    for number, own in enumerate(cut(weighted, job.num_partitions)):
        if own.is_empty():
            continue
        with_content = output_rows.sides(own, judged.contents.of(number))
        made = output_rows.pair_rows(with_content, judged.contents.prompts_of(number), job.config)
        if job.config.format == "prefpipe":
            job.run.write_part("pairs", Pair, len(facts), output_rows.to_table(made, Pair))
        else:
            row_type, table = trl.pairs(made, job.config.format)
            job.run.write_part("trl", row_type, len(facts), table)
        facts.append(data_report.pair_facts(made))
        samples.append(data_report.pair_sample(made, weighted.height))
    totals = {
        "pairs": weighted.height,
        "prompts_with_pairs": weighted["prompt_id"].n_unique(),
        "mean_reward_gap": weighted["reward_gap"].mean(),
        "chosen_longer": (weighted["chosen_num_tokens"] > weighted["rejected_num_tokens"]).mean(),
    }
    sample = _joined(samples)
    return Built(
        judged.levels, judged.ledger, totals, _joined(facts), sample if sample.is_empty() else sample.sort("pair_id")
    )


def _check_scores(pairs: pl.DataFrame, config: BuildPairsConfig) -> None:
    """A subset is chosen by log-probs: all pairs must have them."""
    needed = {"all": (), "clear-reference": ("ref",)}.get(config.subset, ("ref", "policy"))
    for kind in needed:
        bare = pairs.filter(pl.any_horizontal(pl.col(f"{side}_{kind}_logps").is_null() for side in output_rows.SIDES))
        if bare.height:
            raise DataError(
                f"{bare.height} of {pairs.height} pairs have no {'reference' if kind == 'ref' else kind} log-probs "
                f"(first: completion {bare['chosen_completion_id'].min()})",
                f"score the completions: prefpipe score; then pass that run as --{kind}-logps",
            )


def _used(pairs: pl.DataFrame) -> pl.DataFrame:
    return pl.concat(
        pairs.select("prompt_id", pl.col(f"{side}_completion_id").alias("completion_id")) for side in output_rows.SIDES
    )


def _joined(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    return pl.concat(frames) if frames else pl.DataFrame()
