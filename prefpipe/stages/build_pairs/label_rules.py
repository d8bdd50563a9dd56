"""Label rules: which candidates are desirable, undesirable, or dropped with a reason; the class weights of KTO."""

from dataclasses import dataclass

import polars as pl

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.config.losses import class_weights, in_class_ratio
from prefpipe.stages.build_pairs import filters, texts


def by_reward(candidates: pl.DataFrame, config: BuildPairsConfig) -> pl.DataFrame:
    """Candidates with the columns label (true: desirable) and reason (why a candidate gets no label, or null).

    mean, median: desirable above the mean or median reward of the prompt, undesirable below; equal is a tie
    threshold: desirable from label_threshold on
    quantile: desirable in the upper label_quantile of all rewards of the run, undesirable in the lower, else dead_zone
    thumbs: the sign of the reward; 0 is dead_zone
    """
    reward = pl.col("reward")
    low, high, dead = {
        "mean": (reward < _prompt_mean(), reward > _prompt_mean(), "tie"),
        "median": (reward < reward.median().over("prompt_id"), reward > reward.median().over("prompt_id"), "tie"),
        "threshold": (reward < config.label_threshold, reward >= config.label_threshold, "dead_zone"),
        "quantile": (*_quantiles(candidates, config.label_quantile), "dead_zone"),
        "thumbs": (reward < 0, reward > 0, "dead_zone"),
    }[config.label_rule]
    ordered = candidates.sort("prompt_id", "completion_id")  # one order, so that a mean has the same bits
    judged = ordered.with_columns(label=high, reason=pl.when(~(low ^ high)).then(pl.lit(dead)))
    if config.truncated_chosen == "drop":
        judged = _when(judged, pl.col("label") & (pl.col("finish_reason") == "length"), "truncated_chosen")
    if config.truncated_rejected == "drop":
        judged = _when(judged, ~pl.col("label") & (pl.col("finish_reason") == "length"), "truncated_rejected")
    return judged


def from_pairs(pairs: pl.DataFrame, candidates: pl.DataFrame) -> pl.DataFrame:
    """Candidates with a label by their side in the pairs. The reason is contradiction for a candidate on both sides,
    and unused for a candidate in no pair."""
    chosen, rejected = (
        pl.col("completion_id").is_in(pairs[f"{s}_completion_id"].implode()) for s in ("chosen", "rejected")
    )
    judged = candidates.sort("prompt_id", "completion_id").with_columns(label=chosen)
    reason = pl.when(chosen & rejected).then(pl.lit("contradiction")).when(~chosen & ~rejected).then(pl.lit("unused"))
    return judged.with_columns(reason=reason)


def by_content(labels: pl.DataFrame) -> pl.DataFrame:
    """Labels (with text) with a column `reason`: contradiction where equal texts of a prompt have different labels."""
    normal = labels.with_columns(normal=texts.normal("text"))
    differing = pl.col("label").n_unique().over("prompt_id", "normal") > 1
    return normal.with_columns(reason=pl.when(differing).then(pl.lit("contradiction"))).drop("normal")


def ledger(judged: pl.DataFrame) -> pl.DataFrame:
    """Ledger rows of the completions that have a reason."""
    return judged.filter(pl.col(filters.REASON).is_not_null()).select(
        id="completion_id", reason="reason", detail=pl.format("reward {}", pl.col("reward").round(6))
    )


@dataclass(frozen=True)
class Balance:
    """The number of labels of each class, and the class weights for KTO."""

    desirable: int
    undesirable: int
    desirable_weight: float
    undesirable_weight: float


def balance(desirable: int, undesirable: int) -> Balance:
    """The class weights for these numbers of labels; both are 1 where a class is empty or no weight is needed."""
    one_class = not desirable or not undesirable
    if one_class or in_class_ratio(desirable / undesirable):
        return Balance(desirable, undesirable, 1.0, 1.0)
    return Balance(desirable, undesirable, *class_weights(desirable, undesirable))


def _prompt_mean() -> pl.Expr:
    return pl.col("reward").mean().over("prompt_id")


def _quantiles(candidates: pl.DataFrame, share: float) -> tuple[pl.Expr, pl.Expr]:
    """Whether a reward is in the lower share, and whether in the upper share. A reward in both gets no label."""
    rewards = candidates["reward"]
    low, high = rewards.quantile(share, "lower"), rewards.quantile(1 - share, "higher")
    return pl.col("reward") <= low, pl.col("reward") >= high


def _when(judged: pl.DataFrame, applies: pl.Expr, reason: str) -> pl.DataFrame:
    return judged.with_columns(
        reason=pl.when(pl.col("reason").is_null() & applies).then(pl.lit(reason)).otherwise("reason")
    )
