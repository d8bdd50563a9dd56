"""Pair filters: each pair is kept, or dropped with the first reason that applies.

`by_keys` reads key columns, `by_content` texts and token ids, `subset` log-probs. Each adds a column `reason`, which is
null for pairs that are kept. Reasons are tested in the order of the code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.stages.build_pairs import texts

REASON = "reason"
SIDES = ("chosen", "rejected")
_ENOUGH = 20  # completions of a side; with fewer of them equal last tokens may be chance


@dataclass(frozen=True)
class Scale:
    """Measurements of the rule's pairs that thresholds are relative to."""

    gap_sd: float
    least_chosen_reward: float


def scale(pairs: pl.DataFrame, config: BuildPairsConfig) -> Scale:
    """The standard deviation of the reward gaps, and the reward below which a chosen completion is bad."""
    lowest = pairs["chosen_reward"].quantile(config.min_chosen_quantile, "higher") if pairs.height else None
    return Scale(standard_deviation(pairs["reward_gap"].to_list()), -math.inf if lowest is None else float(lowest))


def standard_deviation(values: Sequence[float]) -> float:
    """Population standard deviation, 0 without values. Sums are exact: the order of the values does not matter."""
    if not values:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))


def by_keys(pairs: pl.DataFrame, config: BuildPairsConfig, scale: Scale) -> pl.DataFrame:
    """Reasons small_gap, truncated_*, length_difference, length_ratio, both_bad.

    `pairs` has chosen_* and rejected_* reward, finish_reason, num_tokens, and reward_gap.
    """
    gap = pl.col("reward_gap")
    absolute, scaled = gap < config.min_gap, gap < config.min_gap_sd * scale.gap_sd
    small = {"both": absolute & scaled, "absolute": absolute, "scaled": scaled, "none": pl.lit(value=False)}
    long, short = (
        f(pl.col("chosen_num_tokens").cast(pl.Int64), pl.col("rejected_num_tokens").cast(pl.Int64))
        for f in (pl.max_horizontal, pl.min_horizontal)
    )
    cut = {side: pl.col(f"{side}_finish_reason") == "length" for side in SIDES}
    reason = pl.when(small[config.gap_filter]).then(pl.lit("small_gap"))
    if config.truncated_chosen == "drop":
        reason = reason.when(cut["chosen"]).then(pl.lit("truncated_chosen"))
    if config.truncated_rejected == "drop":
        reason = reason.when(cut["rejected"]).then(pl.lit("truncated_rejected"))
    if config.max_length_difference:
        reason = reason.when(long - short > config.max_length_difference).then(pl.lit("length_difference"))
    if config.max_length_ratio:
        reason = reason.when(long > config.max_length_ratio * short).then(pl.lit("length_ratio"))
    if config.min_chosen_quantile:
        reason = reason.when(pl.col("chosen_reward") < scale.least_chosen_reward).then(pl.lit("both_bad"))
    return pairs.with_columns(reason=reason)


def by_content(pairs: pl.DataFrame, config: BuildPairsConfig) -> pl.DataFrame:
    """Reasons identical_text, near_identical, contradiction.

    `pairs` holds whole prompts, with chosen_* and rejected_* text and token_ids. Texts are compared in their normal
    form (NFC, no space at either end).
    """
    normal = pairs.with_columns(texts.normal(f"{side}_text").alias(f"{side}_normal") for side in SIDES)
    same = pl.col("chosen_normal") == pl.col("rejected_normal")
    judged = normal.with_columns(reason=pl.when(same).then(pl.lit("identical_text")))
    if config.near_identical_tokens or config.near_identical_share:
        near = [
            kept and _near_identical(chosen, rejected, config)
            for kept, chosen, rejected in judged.select(
                pl.col("reason").is_null(), "chosen_token_ids", "rejected_token_ids"
            ).iter_rows()
        ]
        judged = judged.with_columns(
            reason=pl.when(pl.Series(near, dtype=pl.Boolean)).then(pl.lit("near_identical")).otherwise("reason")
        )
    if config.contradictions == "drop":
        cycle = contradictory(judged.with_row_index("place").filter(pl.col("reason").is_null()))
        judged = (
            judged.with_row_index("place")
            .with_columns(
                reason=pl.when(pl.col("place").is_in(cycle)).then(pl.lit("contradiction")).otherwise("reason")
            )
            .drop("place")
        )
    return judged.drop("chosen_normal", "rejected_normal")


def contradictory(pairs: pl.DataFrame) -> list[int]:
    """The `place` of every pair on a cycle of preferences between the texts of its prompt (A over B, B over A).

    `pairs` has place, prompt_id, chosen_normal, rejected_normal. A cycle needs a text that is chosen in one pair and
    rejected in another; only prompts with such a text are searched.
    """
    chosen = pairs.select("prompt_id", text="chosen_normal").unique()
    rejected = pairs.select("prompt_id", text="rejected_normal").unique()
    suspects = chosen.join(rejected, on=["prompt_id", "text"], how="semi").select("prompt_id").unique()
    places: list[int] = []
    for _, group in pairs.join(suspects, on="prompt_id", how="semi").group_by("prompt_id"):
        edges = list(group.select("chosen_normal", "rejected_normal").iter_rows())
        above: dict[str, set[str]] = {}
        for better, worse in edges:
            above.setdefault(better, set()).add(worse)
        places += [p for p, (c, r) in zip(group["place"], edges, strict=True) if _reaches(above, r, c)]
    return sorted(places)


def subset(pairs: pl.DataFrame, config: BuildPairsConfig) -> pl.DataFrame:
    """Reason not_in_subset for every pair but the best subset_share of them (docs/pair-rules.md, Subsets).

    `pairs` has chosen_* and rejected_* ref_logps, policy_logps (sums, in nats) and length (scored tokens), and
    reward_gap.
    """
    if config.subset == "all":
        return pairs.with_columns(reason=pl.lit(None, pl.String))
    implicit = (pl.col("chosen_policy_logps") - pl.col("chosen_ref_logps")) - (
        pl.col("rejected_policy_logps") - pl.col("rejected_ref_logps")
    )
    per_token = [pl.col(f"{side}_ref_logps") / pl.max_horizontal(pl.col(f"{side}_length"), 1) for side in SIDES]
    score = {
        "small-implicit-gap": implicit.abs(),
        "large-dual-margin": -(_in_units(implicit) + _in_units(pl.col("reward_gap"))),
        "clear-reference": per_token[1] - per_token[0],
    }[config.subset]
    kept = max(1, math.floor(config.subset_share * pairs.height))
    order = pairs.select("chosen_completion_id", "rejected_completion_id", score=score.cast(pl.Float64)).with_row_index(
        "place"
    )
    best = order.sort("score", "chosen_completion_id", "rejected_completion_id").head(kept)["place"]
    chosen = pl.Series(range(pairs.height), dtype=pl.UInt32).is_in(best.implode())
    return pairs.with_columns(reason=pl.when(~chosen).then(pl.lit("not_in_subset")))


def end_on_one_side(pairs: pl.DataFrame) -> str | None:
    """A sentence that the two sides were tokenised differently; None where nothing shows it.

    Completions that did not hit max_tokens end with an end-of-sequence token. When the most frequent last token of a
    side ends more than 95 % of that side and no completion of the other, one of the sides lacks the token.
    """
    ends = {s: pairs.filter(pl.col(f"{s}_finish_reason") != "length")[f"{s}_last"].drop_nulls() for s in SIDES}
    if not all(len(e) for e in ends.values()):
        return None
    for token in sorted({t for e in ends.values() for t in e.mode().sort().head(1)}):
        share = {s: float((e == token).sum()) / len(e) for s, e in ends.items()}
        high, low = max(share, key=lambda s: share[s]), min(share, key=lambda s: share[s])
        if share[high] > 0.95 and share[low] == 0 and min(len(e) for e in ends.values()) >= _ENOUGH:
            return f"{high} completions end with token {token}, none of {len(ends[low])} {low} ones does"
    return None


def num_scored(side: str) -> pl.Expr:
    """The number of scored tokens of the chosen or the rejected side of each pair."""
    return pl.coalesce(pl.col(f"{side}_loss_mask").list.sum(), pl.col(f"{side}_token_ids").list.len())


def ledger(judged: pl.DataFrame) -> pl.DataFrame:
    """Ledger rows of the pairs that have a reason."""
    return judged.filter(pl.col(REASON).is_not_null()).select(
        id=pl.concat_str("chosen_completion_id", "rejected_completion_id", separator=">"),
        reason=REASON,
        detail=pl.format("reward_gap {}", pl.col("reward_gap").round(6)),
    )


def kept(judged: pl.DataFrame) -> pl.DataFrame:
    """The rows without a reason to drop them."""
    return judged.filter(pl.col(REASON).is_null()).drop(REASON)


def _in_units(values: pl.Expr) -> pl.Expr:
    """Values scaled linearly to [0, 1], so that margins of different units can be added."""
    values = values.cast(pl.Float64)
    spread = values.max() - values.min()
    return pl.when(spread > 0).then((values - values.min()) / spread).otherwise(0.0)


def _near_identical(chosen: Sequence[int], rejected: Sequence[int], config: BuildPairsConfig) -> bool:
    longest = max(len(chosen), len(rejected))
    limit = max(config.near_identical_tokens, config.near_identical_share * longest)
    return texts.token_edits(chosen, rejected) <= limit


def _reaches(edges: dict[str, set[str]], start: str, goal: str) -> bool:
    seen, waiting = {start}, [start]
    while waiting:
        here = waiting.pop()
        if here == goal:
            return True
        waiting += [n for n in edges.get(here, ()) if n not in seen]
        seen |= edges.get(here, set())
    return False
