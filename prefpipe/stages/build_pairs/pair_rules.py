"""Pair rules: from the ranked candidates of every prompt to pairs, as positions in one flat frame. No text, no files.

A rule is a function `(ranked, config) -> frame` with the columns `chosen` and `rejected`: positions in `ranked.flat`.
Its name is in config/build_pairs.py, and `find` returns it. A rule never pairs equal rewards. Its result does not
depend on the order of rows or on threads: candidates are ranked by (prompt_id, reward descending, completion_id), and
draws depend on (seed, prompt_id) only. docs/pair-rules.md has a section per rule with formula, source and use.
"""

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.ids import sample_seed

_RANDOM_REJECTED = 5  # completions that are drawn; the worst of them is rejected (2502.16825)


Rule = Callable[["Ranked", BuildPairsConfig], pl.DataFrame]


@dataclass(frozen=True)
class Ranked:
    """Candidates of all prompts, prompt after prompt, best first within a prompt.

    `flat` has one row per candidate: prompt (u32, the row of its prompt in `spans`), prompt_id, completion_id, reward,
    num_tokens, finish_reason. `spans` has one row per prompt: prompt, prompt_id, start (position of its best
    candidate), count, ties (how many candidates share the best reward).
    """

    flat: pl.DataFrame
    spans: pl.DataFrame


def rank(candidates: pl.DataFrame) -> Ranked:
    """Rank candidates within their prompts. The rows may come in any order; completion ids are unique."""
    flat = candidates.sort("prompt_id", "reward", "completion_id", descending=[False, True, False]).with_columns(
        prompt=pl.col("prompt_id").rle_id()
    )
    spans = (
        flat.lazy()
        .group_by("prompt", maintain_order=True)
        .agg(
            pl.col("prompt_id").first(),
            count=pl.len().cast(pl.UInt32),
            ties=(pl.col("reward") == pl.col("reward").first()).sum().cast(pl.UInt32),
        )
        .with_columns(start=pl.col("count").cum_sum() - pl.col("count"))
        .collect()
    )
    return Ranked(flat, spans)


def best_worst(ranked: Ranked, config: BuildPairsConfig) -> pl.DataFrame:
    """The k-th best with the k-th worst, k = 1, 2, ...; no completion is in two pairs (2405.07863)."""
    pairs = _explode(ranked.spans, k=pl.int_ranges(0, pl.col("count") // 2, dtype=pl.UInt32))
    pairs = pairs.with_columns(
        chosen=pl.col("start") + pl.col("k"), rejected=pl.col("start") + pl.col("count") - 1 - pl.col("k")
    )
    return _first(_with_gap(ranked, pairs).filter(pl.col("gap") > 0), config)


def best_random_worse(ranked: Ranked, config: BuildPairsConfig) -> pl.DataFrame:
    """The best with random ones among those that have a lower reward (Tulu 3, 2411.15124)."""
    rejected = pl.int_ranges(pl.col("start") + pl.col("ties"), pl.col("start") + pl.col("count"), dtype=pl.UInt32)
    spans = ranked.spans.filter(pl.col("count") > pl.col("ties"))
    if config.pairs_per_prompt == 1:  # one draw needs no list of all worse completions
        drawn = _draws(spans, pl.col("count") - pl.col("ties"), 1, config.seed)
        return drawn.select(chosen=pl.col("start"), rejected=pl.col("start") + pl.col("ties") + pl.col("n"))
    return _drawn(ranked, _explode(spans, rejected=rejected).with_columns(chosen=pl.col("start")), config)


def best_worst_of_5(ranked: Ranked, config: BuildPairsConfig) -> pl.DataFrame:
    """The best with the worst of five random ones (2502.16825): one pair, that of best-worst for five or fewer."""
    drawn = _draws(ranked.spans, pl.col("count"), _RANDOM_REJECTED, config.seed)
    worst = drawn.group_by("prompt", "start", maintain_order=True).agg(pl.col("n").max())
    pairs = worst.select("prompt", chosen=pl.col("start"), rejected=pl.col("start") + pl.col("n"))
    return _with_gap(ranked, pairs).filter(pl.col("gap") > 0).select("chosen", "rejected")


def best_sigma(ranked: Ranked, config: BuildPairsConfig) -> pl.DataFrame:
    """The best with the one whose reward is nearest to mean - 2 standard deviations of its prompt (2502.16825)."""
    target = pl.col("reward").mean() - 2 * pl.col("reward").std(ddof=0)
    targets = ranked.flat.group_by("prompt", maintain_order=True).agg(target=target)
    pairs = (
        _positions(ranked)
        .join(ranked.spans.select("prompt", "start", "ties"), on="prompt", maintain_order="left")
        .join(targets, on="prompt", maintain_order="left")
        .filter(pl.col("position") >= pl.col("start") + pl.col("ties"))
        .with_columns(
            chosen=pl.col("start"), rejected=pl.col("position"), distance=(pl.col("reward") - pl.col("target")).abs()
        )
        .sort("prompt", "distance", "rejected")
    )
    return _first(pairs, config)


def all_above_gap(ranked: Ranked, config: BuildPairsConfig) -> pl.DataFrame:
    """Random pairs of those whose rewards differ by at least rule_gap (RS-DPO, 2402.10038)."""
    return _drawn(ranked, _above_gap(ranked, config.rule_gap), config)


def top_bottom(ranked: Ranked, config: BuildPairsConfig) -> pl.DataFrame:
    """Random pairs of one of the k best with one of the k worst, k = top_k, at most half of the candidates."""
    k = pl.min_horizontal(pl.lit(config.top_k, dtype=pl.UInt32), pl.col("count") // 2)
    end = pl.col("start") + pl.col("count")
    spans = ranked.spans.with_columns(k=k)
    pairs = _explode(spans, chosen=pl.int_ranges("start", pl.col("start") + pl.col("k"), dtype=pl.UInt32))
    pairs = _explode(pairs, rejected=pl.int_ranges(end - pl.col("k"), end, dtype=pl.UInt32))
    return _drawn(ranked, _with_gap(ranked, pairs).filter(pl.col("gap") > 0), config)


def correct_wrong(ranked: Ranked, config: BuildPairsConfig) -> pl.DataFrame:
    """Random pairs of a correct and a wrong completion (iterative RPO, 2404.19733)."""
    spans = _with_correct(ranked, config.correct_reward)
    middle, end = pl.col("start") + pl.col("correct"), pl.col("start") + pl.col("count")
    pairs = _explode(spans, chosen=pl.int_ranges("start", middle, dtype=pl.UInt32))
    return _drawn(ranked, _explode(pairs, rejected=pl.int_ranges(middle, end, dtype=pl.UInt32)), config)


def longest_correct(ranked: Ranked, config: BuildPairsConfig) -> pl.DataFrame:
    """The longest correct completion with random wrong ones (DPO-VP, 2503.12854)."""
    spans = _with_correct(ranked, config.correct_reward)
    longest = (
        _positions(ranked)
        .filter(pl.col("reward") >= config.correct_reward)
        .sort("prompt", "num_tokens", "position", descending=[False, True, False])
        .unique("prompt", keep="first", maintain_order=True)
        .select("prompt", chosen="position")
    )
    spans = spans.join(longest, on="prompt", maintain_order="left")
    middle, end = pl.col("start") + pl.col("correct"), pl.col("start") + pl.col("count")
    return _drawn(ranked, _explode(spans, rejected=pl.int_ranges(middle, end, dtype=pl.UInt32)), config)


def smallest_gap(ranked: Ranked, config: BuildPairsConfig) -> pl.DataFrame:
    """The pair with the smallest gap that is at least rule_gap: hard pairs (HALOs, mode min)."""
    pairs = _above_gap(ranked, config.rule_gap).sort("prompt", "gap", "chosen", "rejected")
    return _first(pairs, config)


def length_controlled(ranked: Ranked, config: BuildPairsConfig) -> pl.DataFrame:
    """The largest gap; on ties the shortest chosen, then the rejected closest in length (WPO v2, 2406.11827).

    With max_length_difference only pairs within that many tokens are candidates (Olmo 3, 2512.13961).
    """
    tokens = ranked.flat["num_tokens"].cast(pl.Int64)
    pairs = _above_gap(ranked, 0.0)
    pairs = pairs.with_columns(tokens=tokens.gather(pairs["chosen"]), other=tokens.gather(pairs["rejected"]))
    pairs = pairs.with_columns(difference=(pl.col("tokens") - pl.col("other")).abs())
    if config.max_length_difference:
        pairs = pairs.filter(pl.col("difference") <= config.max_length_difference)
    order = ["prompt", "gap", "tokens", "difference", "chosen", "rejected"]
    return _first(pairs.sort(order, descending=[name == "gap" for name in order]), config)


def find(name: str) -> Rule:
    """The pair rule of this name."""
    return globals()[name.replace("-", "_")]


_SIDE = ("completion_id", "reward", "finish_reason", "num_tokens")


def pair_frame(ranked: Ranked, pairs: pl.DataFrame) -> pl.DataFrame:
    """Pairs as key columns, from pairs of positions: prompt_id, chosen_* and rejected_* (completion_id, reward,
    finish_reason, num_tokens), reward_gap."""
    flat = ranked.flat
    columns = {f"{side}_{name}": flat[name].gather(pairs[side]) for side in ("chosen", "rejected") for name in _SIDE}
    return pl.DataFrame({"prompt_id": flat["prompt_id"].gather(pairs["chosen"]), **columns}).with_columns(
        reward_gap=pl.col("chosen_reward") - pl.col("rejected_reward")
    )


def _positions(ranked: Ranked) -> pl.DataFrame:
    return ranked.flat.with_row_index("position")


def _explode(frame: pl.DataFrame, **column: pl.Expr) -> pl.DataFrame:
    """One row per value of a list column; rows whose list is empty are left out."""
    (name,) = column
    return frame.with_columns(**column).filter(pl.col(name).list.len() > 0).explode(name)


def _with_gap(ranked: Ranked, pairs: pl.DataFrame) -> pl.DataFrame:
    rewards = ranked.flat["reward"]
    return pairs.with_columns(gap=rewards.gather(pairs["chosen"]) - rewards.gather(pairs["rejected"]))


def _above_gap(ranked: Ranked, least: float) -> pl.DataFrame:
    """All pairs of completions of a prompt whose gap is above 0 and at least `least`: prompt, chosen, rejected, gap."""
    end = pl.col("start") + pl.col("count")
    pairs = _explode(ranked.spans, chosen=pl.int_ranges("start", end, dtype=pl.UInt32))
    pairs = _explode(pairs, rejected=pl.int_ranges(pl.col("chosen") + 1, end, dtype=pl.UInt32))
    return _with_gap(ranked, pairs).filter(pl.col("gap") > 0, pl.col("gap") >= least)


def _with_correct(ranked: Ranked, least: float) -> pl.DataFrame:
    counts = ranked.flat.group_by("prompt", maintain_order=True).agg(
        correct=(pl.col("reward") >= least).sum().cast(pl.UInt32)
    )
    spans = ranked.spans.join(counts, on="prompt", maintain_order="left")
    return spans.filter(pl.col("correct") > 0, pl.col("correct") < pl.col("count"))


def _first(pairs: pl.DataFrame, config: BuildPairsConfig) -> pl.DataFrame:
    """The first pairs_per_prompt pairs of every prompt, in the order of the rows; all pairs where it is 0."""
    if config.pairs_per_prompt:
        pairs = pairs.filter(pl.int_range(pl.len()).over("prompt") < config.pairs_per_prompt)
    return pairs.select("chosen", "rejected")


def _drawn(ranked: Ranked, pairs: pl.DataFrame, config: BuildPairsConfig) -> pl.DataFrame:
    """pairs_per_prompt random pairs of every prompt; all pairs where it is 0, or where there are no more."""
    if not config.pairs_per_prompt:
        return pairs.select("chosen", "rejected")
    pairs = pairs.sort("prompt", "chosen", "rejected").with_columns(n=pl.int_range(pl.len()).over("prompt"))
    spans = ranked.spans.join(pairs.group_by("prompt").agg(pairs=pl.len()), on="prompt", maintain_order="left")
    drawn = _draws(spans, pl.col("pairs"), config.pairs_per_prompt, config.seed)
    return pairs.join(drawn.select("prompt", "n"), on=["prompt", "n"], how="semi", maintain_order="left").select(
        "chosen", "rejected"
    )


def _draws(spans: pl.DataFrame, count: pl.Expr, most: int, seed: int) -> pl.DataFrame:
    """One row per prompt and draw, with the drawn number `n`: up to `most` different numbers below `count`."""
    counts = spans.select(count.alias("count"))["count"].to_list()
    prompts = spans["prompt_id"].to_list()
    drawn = [n for p, c in zip(prompts, counts, strict=True) for n in draw(seed, p, c, most)]
    repeated = spans.select(pl.all().repeat_by(count.clip(upper_bound=most))).explode(spans.columns)
    return repeated.with_columns(n=pl.Series(drawn, dtype=pl.Int64))


def draw(seed: int, prompt_id: str, count: int, most: int) -> list[int]:
    """Up to `most` different numbers from 0 to count - 1 without replacement; equal arguments give equal draws."""
    if most == 1:
        return [sample_seed(seed, prompt_id, 0) % count]
    left = list(range(count))
    return [left.pop(sample_seed(seed, prompt_id, i) % len(left)) for i in range(min(most, count))]
