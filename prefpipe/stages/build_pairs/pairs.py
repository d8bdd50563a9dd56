"""Pairs from candidates: pair rule, filters by key columns, filters by content, subset, weights, rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import polars as pl

from prefpipe.config.build_pairs import SUBSETS, BuildPairsConfig
from prefpipe.errors import DataError
from prefpipe.runs.store import Run
from prefpipe.schemas import Pair
from prefpipe.stages.build_pairs import data_measures, filters, output_rows, pair_rules, trl, user_rules
from prefpipe.stages.build_pairs.accounting import BuildResult, Level, count_reasons
from prefpipe.stages.build_pairs.candidates import LEDGER, Workspace
from prefpipe.stages.build_pairs.filters import SIDES
from prefpipe.stages.build_pairs.output_rows import with_weights
from prefpipe.stages.build_pairs.partitions import cut


@dataclass(frozen=True)
class RulePairs:
    """The pairs that the rule makes of one partition, as key columns, and ledger rows of the prompts without a pair."""

    pairs: pl.DataFrame
    ledger: pl.DataFrame
    num_prompts: int


@dataclass(frozen=True)
class FilteredPairs:
    """The pairs that every filter keeps (key columns), contents by partition, ledger rows and counts of the others."""

    pairs: pl.DataFrame
    ledger: pl.DataFrame
    levels: dict[str, Level]
    contents: list[output_rows.Contents]


def apply_rule(candidates: pl.DataFrame, config: BuildPairsConfig) -> RulePairs:
    """The rule's pairs of one partition. The ledger has prompts without a pair: too_few, tie or no_pair."""
    ranked = pair_rules.rank(candidates)
    pairs = pair_rules.pair_frame(ranked, user_rules.find(config.rule)(ranked, config))
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
    return RulePairs(pairs, ledger, ranked.spans.height)


def filter_pairs(workspace: Workspace, rule_pairs: Sequence[RulePairs]) -> FilteredPairs:
    """Filter the pairs of every partition: by key columns, by content, by subset.

    Raises DataError when a subset lacks log-probs, or when the two sides were tokenised differently.
    """
    config = workspace.config
    pairs = pl.concat(r.pairs for r in rule_pairs)
    by_keys = filters.by_keys(pairs, config, filters.scale(pairs, config))
    useful = filters.kept(by_keys)
    contents = output_rows.fetch(workspace, _completions_of(useful), "pairs")
    parts = cut(useful, workspace.num_partitions)
    by_content = pl.concat(workspace.run(partial(_by_content, config, by_keys.columns), parts, contents))
    _check_logps(filters.kept(by_content), config)
    one_sided = filters.end_on_one_side(filters.kept(by_content))
    if one_sided:
        raise DataError(one_sided, "the two sides were tokenised differently: score them with one model")
    ordered = filters.kept(by_content).sort("prompt_id", "chosen_completion_id", "rejected_completion_id")
    by_subset = filters.subset(ordered, config)
    kept = filters.kept(by_subset)
    without = pl.concat([pl.DataFrame(schema=LEDGER), *(r.ledger for r in rule_pairs)])
    dropped = pl.concat(filters.ledger(judged.select(by_keys.columns)) for judged in (by_keys, by_content, by_subset))
    num_prompts = sum(r.num_prompts for r in rule_pairs)
    levels = {
        "prompts": Level(num_prompts, pairs["prompt_id"].n_unique(), count_reasons(without)),
        "pairs": Level(pairs.height, kept.height, count_reasons(dropped)),
    }
    return FilteredPairs(kept.select(pairs.columns), pl.concat([without, dropped]), levels, contents)


def build(workspace: Workspace, rule_pairs: Sequence[RulePairs]) -> BuildResult:
    """Write the pairs that the filters keep, one file per partition, and count the others by reason."""
    config = workspace.config
    filtered = filter_pairs(workspace, rule_pairs)
    weighted = with_weights(filtered.pairs, config)
    rich = config.format == "trl" and trl.is_rich(workspace.sources)
    write = partial(_write, config, workspace.run_dir, weighted.height, rich)
    written = workspace.map_filled(write, weighted, filtered.contents)
    facts, samples = [made for made, _ in written], [sample for _, sample in written]
    totals = {
        "pairs": weighted.height,
        "prompts_with_pairs": weighted["prompt_id"].n_unique(),
        "mean_reward_gap": weighted["reward_gap"].mean(),
        "chosen_longer": (weighted["chosen_num_tokens"] > weighted["rejected_num_tokens"]).mean(),
    }
    sample = pl.concat(samples).sort("pair_id") if samples else pl.DataFrame()
    return BuildResult(filtered.levels, filtered.ledger, totals, pl.concat(facts) if facts else pl.DataFrame(), sample)


def _write(
    config: BuildPairsConfig,
    run_dir: Run,
    total: int,
    rich: bool,  # noqa: FBT001  (the arguments of a task have places)
    number: int,
    part: pl.DataFrame,
    contents: output_rows.Contents,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Write the pairs of a partition. Returns their `facts` and their part of the `sample`, for the data report."""
    rows = output_rows.pair_rows(output_rows.sides(part, contents.rows()), contents.of_prompts(), config)
    if config.format == "prefpipe":
        run_dir.write_part("pairs", Pair, number, output_rows.to_table(rows, Pair))
    else:
        row_type, table = trl.pairs(rows, config.format, rich=rich)
        run_dir.write_part("trl", row_type, number, table)
    return data_measures.pair_facts(rows), data_measures.pair_sample(rows, total)


_CONTENT_KEYS = (  # contents that later filters read: log-probs, the last token and the length of each side
    *(f"{side}_{name}" for side in SIDES for name in ("ref_logps", "policy_logps")),
    *(pl.col(f"{side}_token_ids").list.last().alias(f"{side}_last") for side in SIDES),
    *(filters.num_scored(side).alias(f"{side}_length") for side in SIDES),
)


def _by_content(
    config: BuildPairsConfig, columns: Sequence[str], pairs: pl.DataFrame, contents: output_rows.Contents
) -> pl.DataFrame:
    """The pairs of a partition with the reason of a filter by content: `columns`, and the contents that later filters
    read."""
    return filters.by_content(output_rows.sides(pairs, contents.rows()), config).select(*columns, *_CONTENT_KEYS)


def _check_logps(pairs: pl.DataFrame, config: BuildPairsConfig) -> None:
    """Raise DataError when a pair lacks log-probs that `subset` compares."""
    for kind in SUBSETS[config.subset]:
        bare = pairs.filter(pl.any_horizontal(pl.col(f"{side}_{kind}_logps").is_null() for side in SIDES))
        if bare.height:
            raise DataError(
                f"{bare.height} of {pairs.height} pairs have no {'reference' if kind == 'ref' else kind} log-probs "
                f"(first: completion {bare['chosen_completion_id'].min()})",
                f"score the completions: prefpipe score; then pass that run as --{kind}-logps",
            )


def _completions_of(pairs: pl.DataFrame) -> pl.DataFrame:
    """prompt_id and completion_id of both sides."""
    return pl.concat(
        pairs.select("prompt_id", pl.col(f"{side}_completion_id").alias("completion_id")) for side in SIDES
    )
