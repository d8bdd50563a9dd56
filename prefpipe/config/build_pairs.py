"""Settings of `prefpipe build-pairs`, and which settings each output, rule or filter reads.

A setting that no chosen output, rule or filter reads must keep its default: it would change nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from prefpipe.config import shared
from prefpipe.config.base import ADDED, PATH, RUNTIME, Config
from prefpipe.config.names import name_or_function

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Choice = Literal["drop", "keep"]


@dataclass(frozen=True)
class PairRule:
    """What the settings class knows of a pair rule.

    reads: settings that only some rules read
    weigh_by: what has the same total weight with weight_by = rule, every prompt or every pair
    """

    reads: tuple[str, ...]
    weigh_by: Literal["prompt", "pair"] = "pair"


# The function of a rule has the same name, with underscores, in stages/build_pairs/pair_rules.py.
RULES = {
    "best-worst": PairRule(("pairs_per_prompt",)),
    "best-random-worse": PairRule(("pairs_per_prompt",)),
    "best-worst-of-5": PairRule(()),
    "best-sigma": PairRule(("pairs_per_prompt",)),
    "all-above-gap": PairRule(("pairs_per_prompt", "rule_gap"), weigh_by="prompt"),
    "top-bottom": PairRule(("pairs_per_prompt", "top_k")),
    "correct-wrong": PairRule(("pairs_per_prompt", "correct_reward")),
    "longest-correct": PairRule(("pairs_per_prompt", "correct_reward")),
    "smallest-gap": PairRule(("pairs_per_prompt", "rule_gap")),
    "length-controlled": PairRule(("pairs_per_prompt",)),
}
# Subset of the pairs -> the models whose log-probs decide which pairs it holds.
SUBSETS: dict[str, tuple[Literal["ref", "policy"], ...]] = {
    "all": (),
    "small-implicit-gap": ("ref", "policy"),
    "large-dual-margin": ("ref", "policy"),
    "clear-reference": ("ref",),
}
if TYPE_CHECKING:  # a type checker cannot read names out of a dict
    RuleName = str
    SubsetName = str
else:
    RuleName = name_or_function(tuple(RULES))
    SubsetName = Literal[tuple(SUBSETS)]

_RULE_SETTINGS = tuple(sorted({name for rule in RULES.values() for name in rule.reads}))
_PAIR_FILTERS = (
    *("gap_filter", "min_gap", "min_gap_sd", "min_chosen_quantile", "max_length_difference", "max_length_ratio"),
    *("near_identical_tokens", "near_identical_share", "contradictions", "subset", "subset_share", "policy_logps"),
)
_PAIR_SELECTION = ("rule", *_RULE_SETTINGS, *_PAIR_FILTERS)
_LABEL_SETTINGS = ("label_rule", "label_threshold", "label_quantile", "kl_bank_rows")
# Setting -> its value -> further settings that are read with this value. A setting that stands in a row of values is
# read only with those that list it; a setting that stands in none is always read. A row stands behind the row that
# lists its setting.
READS: dict[str, dict[str, tuple[str, ...]]] = {
    "output": {
        "pairs": (*_PAIR_SELECTION, "weight_by", "preference_prob", "preference_scale", "beta"),
        "labels": (*_PAIR_SELECTION, "weight_by", *_LABEL_SETTINGS),
        "groups": (),
    },
    "format": {
        "prefpipe": ("weight_by", "preference_prob", "preference_scale", "kl_bank_rows"),
        "trl": (),
        "trl-standard": (),
    },
    "label_rule": {
        **dict.fromkeys(("mean", "median", "thumbs"), ()),
        "threshold": ("label_threshold",),
        "quantile": ("label_quantile",),
        "pairs": _PAIR_SELECTION,
    },
    "rule": {name: rule.reads for name, rule in RULES.items()},
    "preference_prob": {"none": (), "bradley-terry": ("preference_scale",)},
    "gap_filter": {"both": ("min_gap", "min_gap_sd"), "absolute": ("min_gap",), "scaled": ("min_gap_sd",), "none": ()},
    "subset": {
        name: (*(["subset_share"] if logps else []), *(["policy_logps"] if "policy" in logps else []))
        for name, logps in SUBSETS.items()
    },
}


def weighed_by(rule: str) -> str:
    """What has the same total weight with weight_by = rule, `prompt` or `pair`; `pair` with a function of the user."""
    return RULES[rule].weigh_by if rule in RULES else "pair"


def unread(values: Mapping[str, Any]) -> dict[str, str]:
    """The settings that nothing reads under the choices in `values`, each with the choices that would read it."""
    found: dict[str, str] = {}
    for choice, rows in READS.items():
        if choice in found:
            continue
        every = {name for row in rows.values() for name in row}
        read = rows.get(values[choice], every)  # a function of the user may read every setting
        for name in sorted(every - set(read)):
            readers = " or ".join(value for value, row in rows.items() if name in row)
            found.setdefault(name, f"{choice} = {readers}")
    return found


class BuildPairsConfig(Config):
    """Turn completions with rewards into pairs, labels (KTO) or ranked groups; every dropped row has its reason."""

    completions: Annotated[tuple[str, ...], PATH] = ()
    """Run directories with completions; their rewards and reference log-probs are read from them too."""
    reward_runs: Annotated[tuple[str, ...], PATH] = ()
    """Run directories to read the rewards from instead; none reads those in `completions`."""
    ref_logps: Annotated[tuple[str, ...], PATH] = ()
    """Run directories to read the reference log-probs from instead; none reads those in `completions`."""
    policy_logps: Annotated[tuple[str, ...], PATH] = ()
    """Runs of `prefpipe score` whose model was a trained policy: `subset` compares its log-probs with the reference."""
    reward: str = ""  # a run holds computed and imported rewards: only the inputs say which names there are
    """Which reward of the inputs ranks the completions, or a sum of several: "0.7*helpful + 0.3*math". It has no
    default. A completion that lacks a value of one part has no reward."""
    reward_scale: Annotated[Literal["raw", "prompt", "run"], ADDED] = "raw"
    """What is added up: rewards as they are (raw), or less their mean and over their standard deviation among the
    completions of a prompt (prompt) or of all prompts (run)."""
    length_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Rank by reward - length_penalty * tokens. The output holds these penalised rewards and their gaps."""
    output: Literal["pairs", "labels", "groups"] = "pairs"
    """pairs (DPO and relatives), labels with a KL bank (KTO), or ranked groups (listwise losses)."""
    format: Literal["prefpipe", "trl", "trl-standard"] = "prefpipe"
    """prefpipe for `prefpipe train`; trl: messages as TRL's trainers read them; trl-standard: plain text."""
    seed: shared.Seed = 0

    rule: RuleName = "best-random-worse"
    """How completions of a prompt become pairs; docs/pair-rules.md gives formula, source and use of each rule. Or a
    function of yours, module:function."""
    pairs_per_prompt: Count = 1
    """Most pairs of one prompt; 0 for every pair that the rule makes."""
    rule_gap: Annotated[float, Field(ge=0)] = 0.5
    """Rules all-above-gap and smallest-gap: smallest reward_gap of a pair."""
    top_k: Annotated[int, Field(ge=1)] = 2
    """Rule top-bottom: each of the top_k best completions is paired with each of the top_k worst."""
    correct_reward: float = 0.5
    """Rules correct-wrong and longest-correct: a completion is correct when its reward is at least this."""
    weight_by: Literal["rule", "prompt", "pair"] = "rule"
    """What counts the same in training: every pair (or label), or every prompt, however many pairs it has. rule: every
    prompt with the rule all-above-gap, every pair with the others. Weights have mean 1."""
    preference_prob: Literal["none", "bradley-terry"] = "none"
    """bradley-terry writes soft labels, preference_prob = sigmoid(reward_gap / preference_scale); use gap_filter none
    with it."""
    preference_scale: Annotated[float, Field(gt=0)] = 1.0
    """Reward difference that is one nat of preference: 1 for a reward model trained with the Bradley-Terry loss."""

    gap_filter: Literal["both", "absolute", "scaled", "none"] = "both"
    """Drop a pair whose gap is below min_gap (absolute), below min_gap_sd standard deviations (scaled), below both, or
    for no gap at all (none)."""
    min_gap: Annotated[float, Field(ge=0)] = 0.5
    """Smallest reward_gap that is kept, in units of the reward."""
    min_gap_sd: Annotated[float, Field(ge=0)] = 0.25
    """Smallest reward_gap that is kept, in standard deviations of the gaps of the rule's pairs."""
    min_chosen_quantile: Share = 0.0
    """Drop pairs whose chosen reward is below this quantile of chosen rewards: both of their completions are bad."""
    truncated_chosen: Choice = "drop"
    """Chosen (or desirable) completions that hit max_tokens, which teach the policy not to stop: drop, or keep."""
    truncated_rejected: Choice = "keep"
    """Rejected (or undesirable) completions that hit max_tokens: drop, or keep."""
    max_length_difference: Count = 0
    """Most tokens between the lengths of chosen and rejected; 0 for no limit."""
    max_length_ratio: Annotated[float, Field(ge=0)] = 0.0
    """Longest side over shortest side, in tokens, that is kept; 0 for no limit."""
    near_identical_tokens: Count = 0
    """Drop pairs whose sides differ by at most so many token edits; 0 drops identical texts only."""
    near_identical_share: Share = 0.0
    """Drop pairs whose sides differ by at most this share of the longer side, in token edits."""
    contradictions: Choice = "drop"
    """Pairs of a prompt that contradict each other (A over B and B over A, or in a circle; by text): drop, or keep."""
    subset: SubsetName = "all"
    """Keep only subset_share of the pairs: those with the smallest gap of implicit rewards, with the largest sum of
    implicit and reward gap, or with the largest difference of reference log-probs per token; all keeps every pair."""
    subset_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the pairs that `subset` keeps."""

    special_tokens: Choice = "drop"
    """Completions whose text spells control tokens (<|im_end|>, [INST], </s>): drop, or keep."""
    refusals: Choice = "keep"
    """Completions with a phrase of refusal ("I'm sorry, but") in their first 200 characters, as the reward `refusal`
    finds it: drop, or keep."""
    max_repetition: Share = 1.0
    """Largest share of a completion's word 4-grams that repeat an earlier one; 1 for no limit."""
    languages: tuple[str, ...] = ()
    """Keep only completions in these languages (codes like en, de; py3langid of the extra `rewards` tells them); none
    keeps every language."""
    min_tokens: Count = 0
    """Shortest completion, in tokens."""
    max_tokens: Count = 0
    """Longest completion, in tokens; 0 for no limit."""

    duplicate_prompts: Choice = "drop"
    """Prompts whose texts are equal but for case and spaces: drop every one but the first by id, or keep them."""
    near_duplicate_prompts: Share = 0.0
    """Drop prompts whose word 3-grams have this Jaccard similarity with those of an earlier prompt; 0 for off."""
    contamination: Annotated[tuple[str, ...], PATH] = ()
    """Benchmark files (.txt with a text per line, .jsonl, .parquet): prompts that share a word n-gram are dropped."""
    contamination_ngram: Annotated[int, Field(ge=1)] = 13
    """Words in an n-gram of the contamination check; shorter texts are compared as a whole."""

    label_rule: Literal["mean", "median", "threshold", "quantile", "thumbs", "pairs"] = "mean"
    """Desirable is a reward above the prompt's mean or median, from a threshold on, in the upper quantile, or above 0
    (thumbs), or a completion that the pair rule chooses (pairs)."""
    label_threshold: float = 0.5
    """Label rule threshold: smallest desirable reward."""
    label_quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Label rule quantile: this upper share of the rewards is desirable, this lower share undesirable; the rest is
    dropped."""
    kl_bank_rows: Annotated[int, Field(ge=1)] = 256
    """Prompts with the completion of another prompt, for KTO's reference point z0."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """beta that the training will use, for check D13 of the data report."""
    workers: Annotated[int, RUNTIME, Field(ge=1)] = 1
    """Processes that work on partitions of about 400,000 completions each; fewer completions are one partition."""
    cluster: Annotated[str, RUNTIME, Field(pattern=shared.CLUSTER)] = ""
    """Where partitions are worked on: '' in processes of this machine, or on every CPU of a Ray cluster whose machines
    share a disk with OUT and all inputs: ray for that of this machine, or ray://HOST:PORT (docs/guide/machines.md)."""
    strict: Annotated[bool, RUNTIME] = False
    """End with exit code 3 when a check of the data report warns; the run is complete all the same."""

    @model_validator(mode="after")
    def _choices_fit(self) -> Self:
        problems = list(self._misfits())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _misfits(self) -> Iterator[str]:
        if self.output == "groups" and self.format != "prefpipe":
            yield "TRL has no trainer for ranked groups: leave out format, or choose output = pairs or labels"
        if self.cluster and self.workers > 1:
            yield f"workers = {self.workers} is not read with cluster, which takes all of its CPUs"
        for name, reader in unread(dict(self)).items():
            if self._is_changed(name):
                yield f"{name} = {getattr(self, name)} is read only with {reader}"
        if self._is_changed("contamination_ngram") and not self.contamination:
            yield f"contamination_ngram = {self.contamination_ngram} is read only with contamination"
        if "policy" in SUBSETS[self.subset] and not self.policy_logps:
            yield (
                f"subset = {self.subset} needs log-probs of a trained policy: score the completions with it "
                "(prefpipe score) and pass that run as policy_logps"
            )

    def _is_changed(self, name: str) -> bool:
        return getattr(self, name) != type(self).model_fields[name].default
