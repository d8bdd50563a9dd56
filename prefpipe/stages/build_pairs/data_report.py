"""The data report: fifteen checks before GPU hours are spent, each OK, NOTICE or WARN with its advice.

data_measures.py holds the measurements. Thresholds without a source in their docstring are rules of thumb. D12 is for
labels and D15 for sums of rewards; the other checks need pairs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import polars as pl

from prefpipe.stages.build_pairs import data_measures, surface
from prefpipe.stages.build_pairs.label_rules import Balance
from prefpipe.stages.build_pairs.reward_values import Spread

OK, NOTICE, WARN = "OK", "NOTICE", "WARN"
Check = Mapping[str, Any]  # an entry of data_report.json: id and name of a check, and its Finding


@dataclass(frozen=True)
class Data:
    """The input of the checks.

    facts, sample: see data_measures.py
    dropped: number of pairs that a filter dropped, by reason
    num_rule_pairs: number of pairs that the rule made
    beta: the beta of the training to come
    balance: for labels, their classes
    spreads: for a sum of rewards, how much each part varies
    """

    facts: pl.DataFrame
    sample: pl.DataFrame
    dropped: Mapping[str, int]
    num_rule_pairs: int
    beta: float
    balance: Balance | None = None
    spreads: Sequence[Spread] = ()


@dataclass(frozen=True)
class Finding:
    """The result of a check: its level, the measurement in words, advice, and the numbers."""

    level: str
    found: str
    advice: str
    numbers: Mapping[str, Any] = field(default_factory=dict[str, Any])


def report(data: Data) -> list[Check]:
    """The findings of every check that applies to the data, in the order of CHECKS."""
    needs = {"D12": data.balance is not None, "D15": bool(data.spreads)}
    ids = [i for i in CHECKS if needs.get(i, not data.facts.is_empty())]
    return [{"id": i, "name": CHECKS[i][0], **vars(CHECKS[i][1](data))} for i in ids]


def table(checks: Iterable[Check]) -> list[str]:
    """The report as lines of text: id, level, name and finding; the advice stands below a check that is not OK."""
    lines: list[str] = []
    for check in checks:
        lines.append(f"  {check['id']:<4}{check['level']:<7} {check['name']:<20} {check['found']}")
        if check["level"] != OK:
            lines.append(f"{'':<14}-> {check['advice']}")
    return lines


def reward_gap(data: Data) -> Finding:
    """How many pairs the gap filter dropped, and how clear the others are."""
    gap = data.facts["reward_gap"]
    share = data.dropped.get("small_gap", 0) / max(data.num_rule_pairs, 1)
    numbers = {"mean": gap.mean(), "sd": gap.std(ddof=0), "min": gap.min(), "dropped_share": share}
    return Finding(
        NOTICE if share > 0.3 else OK,
        f"mean {numbers['mean']:.3g}, sd {numbers['sd']:.3g}, {share:.0%} dropped as small",
        "many pairs were nearly equal: more samples per prompt, or soft labels (preference_prob, gap_filter none)",
        numbers,
    )


def near_identical(data: Data) -> Finding:
    """Sides that differ in a few tokens: with many of them the chosen log-prob may fall (Smaug, 2402.13228)."""
    share = data_measures.near_identical_share(data.sample)
    return Finding(
        WARN if share > 0.2 else OK,
        f"{share:.1%} differ in a few tokens only",
        "the chosen log-prob may fall: add a loss that holds it (docs/losses.md), or set near_identical_tokens",
        {"share": share},
    )


def contradictions(data: Data) -> Finding:
    """Pairs of the rule that contradict another pair: many of them are noise in the rewards."""
    share = data.dropped.get("contradiction", 0) / max(data.num_rule_pairs, 1)
    return Finding(
        WARN if share > 0.02 else OK,
        f"{share:.1%} of pairs contradict another one",
        f"the labels are noisy: train with label_smoothing {min(share, 0.49):.2f}, or find out why",
        {"share": share},
    )


def hardness(data: Data) -> Finding:
    """How often the reference prefers the chosen side, per token."""
    share = data_measures.reference_prefers_chosen(data.facts)
    if share is None:
        return _UNMEASURED
    jaccard = data_measures.token_overlap(data.sample)
    advice = "the pairs teach little that the reference does not know: harder rejected completions (rule smallest-gap)"
    if share < 0.35:
        advice = "the reference prefers most rejected completions: check the direction of the reward"
    return Finding(
        WARN if share > 0.9 else OK if 0.35 <= share <= 0.75 else NOTICE,
        f"the reference prefers chosen in {share:.0%}; token overlap {jaccard:.2f}",
        advice,
        {"reference_prefers_chosen": share, "jaccard": jaccard},
    )


def prompt_diversity(data: Data) -> Finding:
    """Prompts per pair, the most frequent prompt, and different word 3-grams of the sampled prompts."""
    numbers = data_measures.prompt_diversity(data.facts, data.sample)
    repeated = numbers["top_share"] >= 0.01 and data.facts.height >= 1000
    return Finding(
        WARN if numbers["unique_share"] < 0.5 or repeated else OK,
        f"{numbers['prompts']} prompts for {data.facts.height} pairs, top prompt {numbers['top_share']:.1%}, "
        f"distinct-3 {numbers['distinct_3']:.2f}",
        "more prompts help, more pairs per prompt hardly (Tulu 3): add prompts, or lower pairs_per_prompt",
        numbers,
    )


def size(data: Data) -> Finding:
    """The number of pairs: a few thousand are usual."""
    n = data.facts.height
    return Finding(
        WARN if n < 2000 else NOTICE if n < 5000 else OK,
        f"{n} pairs",
        "too few to measure anything but a rule reward" if n < 500 else "several thousand pairs are usual",
        {"pairs": n},
    )


def length_bias(data: Data) -> Finding:
    """How well the length alone tells the sides apart."""
    numbers = data_measures.length_bias(data.facts)
    longer, ratio, area = numbers["chosen_longer"], numbers["ratio"], numbers["auc"]
    biased = not 0.4 <= longer <= 0.6 or not 1 / 1.2 <= ratio <= 1.2 or max(area, 1 - area) > 0.65
    return Finding(
        WARN if biased else OK,
        f"chosen longer in {longer:.0%}, length ratio {ratio:.2f}, AUC of length {area:.2f}",
        "training may learn length: try rule length-controlled, length_penalty or max_length_difference",
        numbers,
    )


def both_bad(data: Data) -> Finding:
    """Chosen completions with a reward in the lower quartile of both sides."""
    numbers = data_measures.both_bad(data.facts)
    return Finding(
        WARN if numbers["share"] > 0.1 else OK,
        f"{numbers['share']:.1%} of chosen are below the lower quartile ({numbers['quartile']:.3g})",
        "set min_chosen_quantile, or a loss that pushes both down (APO-down)",
        numbers,
    )


def truncation(data: Data) -> Finding:
    """Completions that hit max_tokens, by side."""
    cut = data_measures.truncation(data.facts)
    return Finding(
        WARN if max(cut.values()) > 0.05 else OK,
        f"chosen {cut['chosen']:.1%}, rejected {cut['rejected']:.1%} cut off",
        "one side cut off more often teaches length: raise max_tokens of generate, or set truncated_rejected drop",
        cut,
    )


def surface_shortcut(data: Data) -> Finding:
    """How well marks of form (openings, lists, punctuation) tell the sides of held-out pairs apart."""
    accuracy, strongest = surface.shortcut(data.sample["chosen_text"].to_list(), data.sample["rejected_text"].to_list())
    return Finding(
        WARN if accuracy > 0.75 else OK,
        f"form alone picks chosen in {accuracy:.0%} of held-out pairs (strongest: {strongest})",
        "the policy may learn the form and nothing else: look at some pairs, vary the rejected side",
        {"accuracy": accuracy, "strongest": strongest},
    )


def off_policy(data: Data) -> Finding:
    """Sides from different policies, and how likely the reference is to write them, per token."""
    if data_measures.one_sided_policies(data.facts):
        return Finding(
            WARN,
            "chosen and rejected always come from different models",
            "the policy can learn whose text it is: mix the models on both sides",
            {"one_sided": True},
        )
    logps = data_measures.reference_logps_per_token(data.facts)
    if logps is None:
        return _UNMEASURED
    chosen, rejected = logps
    return Finding(
        WARN if chosen < -2.5 or chosen - rejected < -1 else OK,
        f"reference log-prob per token {chosen:.2f} chosen, {rejected:.2f} rejected",
        "the reference would hardly write the chosen side: sample from the policy itself, or weight pairs (WPO)",
        {"chosen_per_token": chosen, "rejected_per_token": rejected, "one_sided": False},
    )


def class_balance(data: Data) -> Finding:
    """Class balance for KTO: weights that bring the weighted ratio into [1, 3/2] (2402.01306, section 4.1)."""
    b = data.balance
    assert b is not None
    weighted = b.desirable_weight != 1 or b.undesirable_weight != 1
    return Finding(
        NOTICE if weighted else OK,
        f"{b.desirable} desirable, {b.undesirable} undesirable",
        f"train with desirable_weight {b.desirable_weight:.3g} and undesirable_weight {b.undesirable_weight:.3g}",
        asdict(b),
    )


def beta(data: Data) -> Finding:
    """1/beta is the log-ratio, in nats, that makes one unit of implicit reward; here per token of these pairs."""
    length = data_measures.mean_tokens(data.facts)
    shift = data.beta * length * 0.1
    return Finding(
        WARN if shift > 5 or shift < 0.05 else OK,
        f"1/beta = {1 / data.beta:.3g} nats, {1 / data.beta / max(length, 1):.3g} per token at {length:.0f} tokens",
        "a shift of 0.1 nat per token gives an implicit reward of "
        f"{shift:.2g}: " + ("lower beta, or a length-normalised loss" if shift > 5 else "raise beta"),
        {"nats": 1 / data.beta, "nats_per_token": 1 / data.beta / max(length, 1), "mean_tokens": length},
    )


def template(data: Data) -> Finding:
    """Whether all prompts end with the same tokens (the generation prompt) and begin with one BOS, and no completion
    repeats the generation prompt."""
    numbers = data_measures.template(data.sample)
    several = numbers.pop("prompts") > 1
    problems = {
        "prompts have no common end": several and not numbers["common_end"],
        f"{numbers['doubled_start']} prompts begin with the same token twice": numbers["doubled_start"],
        f"{numbers['repeated_prompt']} completions begin with the generation prompt": numbers["repeated_prompt"],
    }
    named = [problem for problem, applies in problems.items() if applies]
    return Finding(
        WARN if named else OK,
        "; ".join(named) or f"prompts share their last {numbers['common_end']} tokens",
        "check the chat template that made these ids: the policy will see the same boundary when it is used",
        numbers,
    )


def reward_parts(data: Data) -> Finding:
    """How much each part of a sum of rewards varies among the candidates, and within a prompt, where pairs are made."""
    idle = [spread.name for spread in data.spreads if spread.share < 0.05]
    incomplete = any(spread.missing for spread in data.spreads)
    return Finding(
        NOTICE if idle or incomplete else OK,
        "; ".join(map(str, data.spreads)),
        f"{' and '.join(idle)} hardly changes which answer is better: raise its weight, or set reward_scale prompt"
        if idle
        else "completions that lack a part are left out: rate them with prefpipe score",
        {spread.name: asdict(spread) for spread in data.spreads},
    )


CHECKS: dict[str, tuple[str, Callable[[Data], Finding]]] = {
    "D1": ("reward gap", reward_gap),
    "D2": ("near-identical", near_identical),
    "D3": ("contradictions", contradictions),
    "D4": ("hardness", hardness),
    "D5": ("prompt diversity", prompt_diversity),
    "D6": ("size", size),
    "D7": ("length bias", length_bias),
    "D8": ("both bad", both_bad),
    "D9": ("truncation", truncation),
    "D10": ("surface shortcut", surface_shortcut),
    "D11": ("off-policy", off_policy),
    "D12": ("class balance", class_balance),
    "D13": ("beta", beta),
    "D14": ("template", template),
    "D15": ("reward parts", reward_parts),
}
_UNMEASURED = Finding(NOTICE, "not measured: no reference log-probs", "score the completions first: prefpipe score")
