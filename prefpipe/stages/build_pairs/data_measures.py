"""The measurements behind the checks of data_report.py: numbers from pairs, without thresholds and advice.

`facts` has one row per pair: prompt_id, chosen_ and rejected_ reward, tokens (scored tokens), finish_reason and policy,
reward_gap, ref_chosen_logps and ref_rejected_logps (sums in nats, null without a reference). `sample` has texts and
token ids of up to 10,000 pairs: pair_id, prompt_id, prompt, prompt_token_ids, and chosen_ and rejected_ text and ids.
"""

import math

import polars as pl

from prefpipe.ids import common_prefix
from prefpipe.stages.build_pairs import texts
from prefpipe.stages.build_pairs.filters import SIDES, num_scored

_SAMPLE = 10_000


def pair_facts(pairs: pl.DataFrame) -> pl.DataFrame:
    """The `facts` of pairs (rows of Pair with chosen_policy and rejected_policy)."""
    return pairs.select(
        "prompt_id",
        "chosen_reward",
        "rejected_reward",
        "reward_gap",
        *(num_scored(s).alias(f"{s}_tokens") for s in SIDES),
        *(f"{s}_finish_reason" for s in SIDES),
        *(f"ref_{s}_logps" for s in SIDES),
        *(f"{s}_policy" for s in SIDES),
    )


def pair_sample(pairs: pl.DataFrame, total: int) -> pl.DataFrame:
    """The `sample` of pairs: those with the lowest ids, which are hashes; 10,000 of `total` pairs are expected in
    it."""
    limit = min(1.0, _SAMPLE / total) * 16**8
    lowest = pairs.filter(pl.col("pair_id").str.head(8).str.to_integer(base=16) < limit)
    return lowest.select(
        "pair_id",
        "prompt_id",
        "prompt_token_ids",
        prompt=texts.conversation("prompt"),
        **{f"{s}_text": pl.col(f"{s}_text") for s in SIDES},
        **{f"{s}_ids": pl.col(f"{s}_token_ids") for s in SIDES},
    ).sort("pair_id")


def near_identical_share(sample: pl.DataFrame) -> float:
    """Share of pairs whose sides differ by at most 3 token edits, or by under 5 % of the longer side."""
    low = [
        (edits := texts.token_edits(c, r)) <= 3 or edits < 0.05 * max(len(c), len(r))
        for c, r in sample.select("chosen_ids", "rejected_ids").iter_rows()
    ]
    return sum(low) / max(len(low), 1)


def reference_prefers_chosen(facts: pl.DataFrame) -> float | None:
    """Share of pairs whose chosen side has the higher reference log-prob per token; None without log-probs."""
    gap = (_per_token(facts, "chosen") - _per_token(facts, "rejected")).drop_nulls()
    return None if gap.is_empty() else float((gap > 0).sum()) / len(gap)


def token_overlap(sample: pl.DataFrame) -> float:
    """Mean Jaccard similarity of the tokens of both sides."""
    overlap = [texts.jaccard(c, r) for c, r in sample.select("chosen_ids", "rejected_ids").iter_rows()]
    return sum(overlap) / max(len(overlap), 1)


def prompt_diversity(facts: pl.DataFrame, sample: pl.DataFrame) -> dict[str, float]:
    """prompts, unique_share (prompts per pair), top_share (pairs of the most frequent prompt per pair), and distinct_3:
    different word 3-grams of the sampled prompts per 3-gram."""
    per_prompt = facts["prompt_id"].value_counts()["count"]
    prompts = sample.unique("prompt_id", keep="first", maintain_order=True)["prompt"]
    ngrams = [texts.ngrams(texts.words(p), 3) for p in prompts]
    return {
        "prompts": len(per_prompt),
        "unique_share": len(per_prompt) / facts.height,
        "top_share": int(per_prompt.sort()[-1]) / facts.height,
        "distinct_3": len(set[str]().union(*ngrams)) / max(sum(map(len, ngrams)), 1),
    }


def length_bias(facts: pl.DataFrame) -> dict[str, float]:
    """chosen_longer (share, of the pairs with sides of different length), ratio (tokens of all chosen over tokens of
    all rejected), and auc of the length."""
    chosen, rejected = facts["chosen_tokens"], facts["rejected_tokens"]
    different = int((chosen != rejected).sum())
    return {
        "chosen_longer": int((chosen > rejected).sum()) / different if different else 0.5,
        "ratio": float(chosen.sum()) / max(float(rejected.sum()), 1.0),
        "auc": auc(chosen, rejected),
    }


def auc(ones: pl.Series, others: pl.Series) -> float:
    """Probability that a value of `ones` is above a value of `others`; ties count half (Mann-Whitney U / n m)."""
    values = pl.concat([ones.cast(pl.Float64), others.cast(pl.Float64)])
    ranks = float(values.rank("average").head(len(ones)).sum())
    return (ranks - len(ones) * (len(ones) + 1) / 2) / (len(ones) * len(others))


def both_bad(facts: pl.DataFrame) -> dict[str, float]:
    """share of chosen rewards below quartile, the lower quartile of the rewards of both sides."""
    chosen = facts["chosen_reward"]
    quartile = pl.concat([chosen, facts["rejected_reward"]]).quantile(0.25, "lower")
    assert quartile is not None  # facts has a row
    return {"share": float((chosen < quartile).sum()) / len(chosen), "quartile": quartile}


def truncation(facts: pl.DataFrame) -> dict[str, float]:
    """Share of completions that hit max_tokens, by side."""
    return {s: float((facts[f"{s}_finish_reason"] == "length").sum()) / facts.height for s in SIDES}


def one_sided_policies(facts: pl.DataFrame) -> bool:
    """Whether every policy made completions of one side only."""
    policies = [set(facts[f"{s}_policy"].unique()) for s in SIDES]
    return not policies[0] & policies[1]


def reference_logps_per_token(facts: pl.DataFrame) -> tuple[float, float] | None:
    """Mean reference log-prob per token of chosen and of rejected completions; None for a side without log-probs."""
    chosen, rejected = (_per_token(facts, s).drop_nulls() for s in SIDES)
    if chosen.is_empty() or rejected.is_empty():
        return None
    return math.fsum(chosen) / len(chosen), math.fsum(rejected) / len(rejected)


def mean_tokens(facts: pl.DataFrame) -> float:
    """Mean number of tokens of a completion."""
    return sum(int(facts[f"{s}_tokens"].sum()) for s in SIDES) / (2 * facts.height)


def template(sample: pl.DataFrame) -> dict[str, int]:
    """Signs of the chat template in the token ids: prompts (number of different prompts), common_end (tokens with which
    every prompt ends: the generation prompt), doubled_start (prompts that begin with the same token twice),
    repeated_prompt (completions that begin with the common end)."""
    prompts = [tuple(row) for row in sample.unique("prompt_id", maintain_order=True)["prompt_token_ids"]]
    shared = common_prefix([p[::-1] for p in prompts]) if len(set(prompts)) > 1 else 0
    end = prompts[0][len(prompts[0]) - shared :] if prompts else ()
    completions = [*sample["chosen_ids"].to_list(), *sample["rejected_ids"].to_list()]
    return {
        "prompts": len(set(prompts)),
        "common_end": len(end),
        "doubled_start": sum(len(p) > 1 and p[0] == p[1] for p in prompts),
        "repeated_prompt": sum(bool(end) and tuple(c[: len(end)]) == end for c in completions),
    }


def _per_token(facts: pl.DataFrame, side: str) -> pl.Series:
    return facts[f"ref_{side}_logps"].cast(pl.Float64) / facts[f"{side}_tokens"].clip(1)
