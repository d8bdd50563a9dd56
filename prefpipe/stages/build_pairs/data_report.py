"""What a careful person checks before spending GPU hours: fourteen checks, each OK, NOTICE or WARN with its advice.

`facts` has one row per pair (prompt_id, rewards, token counts, finish reasons, reference log-probs and policies);
`sample` has the texts and token ids of up to 10,000 pairs, drawn by pair_id. Thresholds without a source in their
docstring are rules of thumb. D12 is for labels; the other checks need pairs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import polars as pl

from prefpipe.ids import common_prefix
from prefpipe.stages.build_pairs import surface, texts
from prefpipe.stages.build_pairs.label_rules import Balance

OK, NOTICE, WARN = "OK", "NOTICE", "WARN"
_SAMPLE = 10_000
_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Data:
    """What the checks look at. `dropped` counts pairs by reason; `found` is how many the rule found."""

    facts: pl.DataFrame
    sample: pl.DataFrame
    dropped: Mapping[str, int]
    found: int
    beta: float
    balance: Balance | None = None


@dataclass(frozen=True)
class Check:
    """The result of one check: what was measured, in words and in numbers, and what to do about it."""

    id: str
    name: str
    level: str
    found: str
    advice: str
    numbers: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def to_json(self) -> dict[str, Any]:
        """As it stands in data_report.json."""
        return asdict(self)


def report(data: Data) -> list[Check]:
    """All checks that apply, in their order."""
    if data.facts.is_empty():
        return [d12(data)] if data.balance else []
    checks = [c for c in CHECKS if c is not d12 or data.balance]
    return [check(data) for check in checks]


def table(checks: list[Check]) -> list[str]:
    """The report as lines of text: id, level, name, finding; the advice below what is not OK."""
    lines: list[str] = []
    for check in checks:
        lines.append(f"  {check.id:<4}{check.level:<7} {check.name:<20} {check.found}")
        if check.level != OK:
            lines.append(f"{'':<14}-> {check.advice}")
    return lines


def pair_facts(pairs: pl.DataFrame) -> pl.DataFrame:
    """The narrow columns of pairs (rows of Pair with chosen_policy and rejected_policy beside them)."""
    return pairs.select(
        "prompt_id",
        "chosen_reward",
        "rejected_reward",
        "reward_gap",
        *(pl.col(f"{s}_token_ids").list.len().alias(f"{s}_tokens") for s in _SIDES),
        *(f"{s}_finish_reason" for s in _SIDES),
        *(f"ref_{s}_logps" for s in _SIDES),
        *(f"{s}_policy" for s in _SIDES),
    )


def pair_sample(pairs: pl.DataFrame, total: int) -> pl.DataFrame:
    """Texts and token ids of those pairs whose id is among the lowest, 10,000 of `total` in expectation."""
    limit = min(1.0, _SAMPLE / total) * 16**8
    chosen = pairs.filter(pl.col("pair_id").str.head(8).str.to_integer(base=16) < limit)
    return chosen.select(
        "pair_id",
        "prompt_id",
        "prompt_token_ids",
        prompt=texts.conversation("prompt"),
        **{f"{s}_text": pl.col(f"{s}_text") for s in _SIDES},
        **{f"{s}_ids": pl.col(f"{s}_token_ids") for s in _SIDES},
    ).sort("pair_id")


def d1(data: Data) -> Check:
    """Gap: how many pairs the gap filter dropped, and how clear the rest is."""
    gap, small = data.facts["reward_gap"], data.dropped.get("small_gap", 0)
    share = small / max(data.found, 1)
    numbers = {"mean": gap.mean(), "sd": gap.std(ddof=0), "min": gap.min(), "dropped_share": share}
    return Check(
        "D1",
        "reward gap",
        NOTICE if share > 0.3 else OK,
        f"mean {numbers['mean']:.3g}, sd {numbers['sd']:.3g}, {share:.0%} dropped as small",
        "many pairs were nearly equal: more samples per prompt, or soft labels (preference_prob, gap_filter none)",
        numbers,
    )


def d2(data: Data) -> Check:
    """Near-identical sides: at most 3 token edits, or under 5 % of the tokens; above 20 % displacement is a risk
    (Smaug, 2402.13228)."""
    ids = data.sample.select("chosen_ids", "rejected_ids").rows()
    low = [e <= 3 or e < 0.05 * max(len(c), len(r)) for c, r in ids if (e := texts.token_edits(c, r)) >= 0]
    share = sum(low) / max(len(low), 1)
    return Check(
        "D2",
        "near-identical",
        WARN if share > 0.2 else OK,
        f"{share:.1%} differ in a few tokens only",
        "the chosen log-prob may fall: train with an NLL term or a DPOP loss, or set near_identical_tokens",
        {"share": share},
    )


def d3(data: Data) -> Check:
    """Contradictions among the pairs that the rule found; above 2 % the labels are noisy."""
    share = data.dropped.get("contradiction", 0) / max(data.found, 1)
    return Check(
        "D3",
        "contradictions",
        WARN if share > 0.02 else OK,
        f"{share:.1%} of pairs contradict another one",
        f"the labels are noisy: train with label_smoothing {min(share, 0.49):.2f}, or find out why",
        {"share": share},
    )


def d4(data: Data) -> Check:
    """Hardness: how often the reference itself prefers the chosen side, per token."""
    gap = _per_token(data.facts, "chosen") - _per_token(data.facts, "rejected")
    gap = gap.drop_nulls()
    if gap.is_empty():
        return _unmeasured("D4", "hardness")
    share = float((gap > 0).sum()) / len(gap)
    overlap = [texts.jaccard(c, r) for c, r in data.sample.select("chosen_ids", "rejected_ids").iter_rows()]
    jaccard = sum(overlap) / max(len(overlap), 1)
    level = WARN if share > 0.9 else OK if 0.35 <= share <= 0.75 else NOTICE
    advice = "the pairs teach little that the reference does not know: harder rejected completions (rule smallest-gap)"
    if share < 0.35:
        advice = "the reference prefers most rejected completions: check the direction of the reward"
    return Check(
        "D4",
        "hardness",
        level,
        f"the reference prefers chosen in {share:.0%}; token overlap {jaccard:.2f}",
        advice,
        {"reference_prefers_chosen": share, "jaccard": jaccard},
    )


def d5(data: Data) -> Check:
    """Prompt diversity: prompts per pair, the most frequent prompt, distinct word 3-grams of a sample."""
    per_prompt = data.facts["prompt_id"].value_counts()["count"]
    unique, top = len(per_prompt) / data.facts.height, int(per_prompt.sort()[-1]) / data.facts.height
    prompts = data.sample.unique("prompt_id", keep="first", maintain_order=True)["prompt"]
    grams = [texts.ngrams(texts.words(p), 3) for p in prompts]
    distinct = len(set[str]().union(*grams)) / max(sum(map(len, grams)), 1)
    bad = unique < 0.5 or (top >= 0.01 and data.facts.height >= 1000)
    return Check(
        "D5",
        "prompt diversity",
        WARN if bad else OK,
        f"{len(per_prompt)} prompts for {data.facts.height} pairs, top prompt {top:.1%}, distinct-3 {distinct:.2f}",
        "more prompts help, more pairs per prompt hardly (Tulu 3): add prompts, or lower pairs_per_prompt",
        {"prompts": len(per_prompt), "unique_share": unique, "top_share": top, "distinct_3": distinct},
    )


def d6(data: Data) -> Check:
    """Size: under 500 and under 2,000 pairs warn, under 5,000 is worth a note."""
    n = data.facts.height
    return Check(
        "D6",
        "size",
        WARN if n < 2000 else NOTICE if n < 5000 else OK,
        f"{n} pairs",
        "too few to measure anything but a rule reward" if n < 500 else "several thousand pairs are usual",
        {"pairs": n},
    )


def d7(data: Data) -> Check:
    """Length bias: share of longer chosen, ratio of mean lengths, and how well length alone tells the sides apart."""
    chosen, rejected = data.facts["chosen_tokens"], data.facts["rejected_tokens"]
    different = int((chosen != rejected).sum())
    longer = int((chosen > rejected).sum()) / different if different else 0.5
    ratio = float(chosen.sum()) / max(float(rejected.sum()), 1.0)
    area = auc(chosen, rejected)
    bad = not 0.4 <= longer <= 0.6 or not 1 / 1.2 <= ratio <= 1.2 or max(area, 1 - area) > 0.65
    return Check(
        "D7",
        "length bias",
        WARN if bad else OK,
        f"chosen longer in {longer:.0%}, length ratio {ratio:.2f}, AUC of length {area:.2f}",
        "training may learn length: try rule length-controlled, length_penalty or max_length_difference",
        {"chosen_longer": longer, "ratio": ratio, "auc": area},
    )


def d8(data: Data) -> Check:
    """Both bad: chosen completions below the lower quartile of all rewards in the pairs."""
    chosen = data.facts["chosen_reward"]
    quartile = pl.concat([chosen, data.facts["rejected_reward"]]).quantile(0.25, "lower")
    share = float((chosen < quartile).sum()) / len(chosen)
    return Check(
        "D8",
        "both bad",
        WARN if share > 0.1 else OK,
        f"{share:.1%} of chosen are below the lower quartile ({quartile:.3g})",
        "set min_chosen_quantile, or a loss that pushes both down (APO-down)",
        {"share": share, "quartile": quartile},
    )


def d9(data: Data) -> Check:
    """Truncation: completions that hit max_tokens, by side."""
    cut = {s: float((data.facts[f"{s}_finish_reason"] == "length").sum()) / data.facts.height for s in _SIDES}
    return Check(
        "D9",
        "truncation",
        WARN if max(cut.values()) > 0.05 else OK,
        f"chosen {cut['chosen']:.1%}, rejected {cut['rejected']:.1%} cut off",
        "one side cut off more often teaches length: raise max_tokens of generate, or set truncated_rejected drop",
        cut,
    )


def d10(data: Data) -> Check:
    """Surface shortcut: how well marks of form (openings, lists, length of lines) tell the sides apart, held out."""
    chosen, rejected = (data.sample[f"{s}_text"].to_list() for s in _SIDES)
    area, best = surface.shortcut(chosen, rejected)
    return Check(
        "D10",
        "surface shortcut",
        WARN if area > 0.75 else OK,
        f"form alone picks chosen in {area:.0%} of held-out pairs (strongest: {best})",
        "the policy may learn the form and nothing else: look at some pairs, vary the rejected side",
        {"accuracy": area, "strongest": best},
    )


def d11(data: Data) -> Check:
    """Off-policyness: chosen log-prob per token under the reference, distance to rejected, one-sided sources."""
    sources = {s: set(data.facts[f"{s}_policy"].unique()) for s in _SIDES}
    one_sided = sources["chosen"] != sources["rejected"] and not sources["chosen"] & sources["rejected"]
    if one_sided:
        return Check(
            "D11",
            "off-policy",
            WARN,
            "chosen and rejected always come from different models",
            "the policy can learn whose text it is: mix the models on both sides",
            {"one_sided": True},
        )
    per_token = [_per_token(data.facts, s).drop_nulls() for s in _SIDES]
    if not all(len(p) for p in per_token):
        return _unmeasured("D11", "off-policy")
    chosen, rejected = (math.fsum(p) / len(p) for p in per_token)
    bad = chosen < -2.5 or chosen - rejected < -1
    return Check(
        "D11",
        "off-policy",
        WARN if bad else OK,
        f"reference log-prob per token {chosen:.2f} chosen, {rejected:.2f} rejected",
        "the reference would hardly write the chosen side: sample from the policy itself, or weight pairs (WPO)",
        {"chosen_per_token": chosen, "rejected_per_token": rejected, "one_sided": False},
    )


def d12(data: Data) -> Check:
    """Class balance for KTO: weights that bring the weighted ratio into [1, 3/2] (2402.01306, section 4.1)."""
    b = data.balance
    assert b is not None
    weighted = b.desirable_weight != 1 or b.undesirable_weight != 1
    return Check(
        "D12",
        "class balance",
        NOTICE if weighted else OK,
        f"{b.desirable} desirable, {b.undesirable} undesirable",
        f"train with desirable_weight {b.desirable_weight:.3g} and undesirable_weight {b.undesirable_weight:.3g}",
        asdict(b),
    )


def d13(data: Data) -> Check:
    """Beta: 1/beta is how many nats of log-ratio make one unit of implicit reward, here per token of this data."""
    length = sum(int(data.facts[f"{s}_tokens"].sum()) for s in _SIDES) / (2 * data.facts.height)
    drift = data.beta * length * 0.1
    bad = drift > 5 or drift < 0.05
    return Check(
        "D13",
        "beta",
        WARN if bad else OK,
        f"1/beta = {1 / data.beta:.3g} nats, {1 / data.beta / max(length, 1):.3g} per token at {length:.0f} tokens",
        "a shift of 0.1 nat per token gives an implicit reward of "
        f"{drift:.2g}: " + ("lower beta, or a length-normalised loss" if drift > 5 else "raise beta"),
        {"nats": 1 / data.beta, "nats_per_token": 1 / data.beta / max(length, 1), "mean_tokens": length},
    )


def d14(data: Data) -> Check:
    """Template: prompts end with the same tokens (the generation prompt), begin with one BOS, and no completion repeats
    the generation prompt."""
    ids = [tuple(row) for row in data.sample.unique("prompt_id", maintain_order=True)["prompt_token_ids"]]
    shared = common_prefix([i[::-1] for i in ids]) if len(set(ids)) > 1 else 0
    tail = ids[0][len(ids[0]) - shared :] if ids else ()
    doubled = sum(len(i) > 1 and i[0] == i[1] for i in ids)
    answers = [*data.sample["chosen_ids"].to_list(), *data.sample["rejected_ids"].to_list()]
    repeated = sum(bool(tail) and tuple(a[: len(tail)]) == tail for a in answers)
    problems = [
        *(["prompts have no common end"] if len(set(ids)) > 1 and not tail else []),
        *([f"{doubled} prompts begin with the same token twice"] if doubled else []),
        *([f"{repeated} completions begin with the generation prompt"] if repeated else []),
    ]
    return Check(
        "D14",
        "template",
        WARN if problems else OK,
        "; ".join(problems) or f"prompts share their last {len(tail)} tokens",
        "check the chat template that made these ids: the policy will see the same boundary when it is used",
        {"common_end": len(tail), "doubled_start": doubled, "repeated_prompt": repeated},
    )


CHECKS: tuple[Callable[[Data], Check], ...] = (d1, d2, d3, d4, d5, d6, d7, d8, d9, d10, d11, d12, d13, d14)


def auc(ones: pl.Series, others: pl.Series) -> float:
    """Probability that a value of `ones` is above one of `others`, ties count half (Mann-Whitney U / n m)."""
    values = pl.concat([ones.cast(pl.Float64), others.cast(pl.Float64)])
    ranks = float(values.rank("average").head(len(ones)).sum())
    return (ranks - len(ones) * (len(ones) + 1) / 2) / (len(ones) * len(others))


def _per_token(facts: pl.DataFrame, side: str) -> pl.Series:
    return facts[f"ref_{side}_logps"].cast(pl.Float64) / facts[f"{side}_tokens"].clip(1)


def _unmeasured(id_: str, name: str) -> Check:
    return Check(
        id_, name, NOTICE, "not measured: no reference log-probs", "score the completions first: prefpipe score", {}
    )
