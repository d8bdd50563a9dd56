"""Settings of `prefpipe build-pairs`."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from prefpipe.config import shared
from prefpipe.config.base import PATH, RUNTIME, STRICT

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Choice = Literal["drop", "keep"]


class BuildPairsConfig(BaseModel):
    """Turn completions with rewards into pairs, labels (KTO) or ranked groups; every dropped row has its reason."""

    model_config = STRICT

    completions: Annotated[tuple[str, ...], PATH] = ()
    """Run directories with completions (and, unless given apart, their rewards and reference log-probs)."""
    reward_runs: Annotated[tuple[str, ...], PATH] = ()
    """Run directories with rewards for these completions; none: those of the completions' own runs."""
    ref_logps: Annotated[tuple[str, ...], PATH] = ()
    """Run directories with reference log-probs for these completions; none: those of the completions' own runs."""
    policy_logps: Annotated[tuple[str, ...], PATH] = ()
    """Runs of `prefpipe score` with a trained policy as the reference: what an implicit reward needs (see subset)."""
    reward: shared.StoredReward = "short_sentence"
    """Which reward ranks the completions."""
    length_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Rank by reward - length_penalty * tokens; rewards and gaps of the output are then these."""
    output: Literal["pairs", "labels", "groups"] = "pairs"
    """pairs (DPO and relatives), labels with a KL bank (KTO), or ranked groups (listwise losses)."""
    format: Literal["prefpipe", "trl", "trl-standard"] = "prefpipe"
    """prefpipe for `prefpipe train`; trl: messages as TRL's trainers read them; trl-standard: plain text."""
    seed: shared.Seed = 0

    rule: Literal[
        "best-worst",
        "best-random-worse",
        "best-worst-of-5",
        "best-sigma",
        "all-above-gap",
        "top-bottom",
        "correct-wrong",
        "longest-correct",
        "smallest-gap",
        "length-controlled",
    ] = "best-random-worse"
    """How completions of a prompt become pairs; docs/pair-rules.md has formula, source and use of each."""
    pairs_per_prompt: Count = 1
    """Most pairs taken from one prompt; 0 for all that the rule finds."""
    rule_gap: Annotated[float, Field(ge=0)] = 0.5
    """Least reward_gap that the rules all-above-gap and smallest-gap pair."""
    top_k: Annotated[int, Field(ge=1)] = 2
    """Rule top-bottom pairs each of the k best with each of the k worst."""
    correct_reward: float = 0.5
    """Rules correct-wrong and longest-correct: a completion is correct when its reward is at least this."""
    weight_by: Literal["rule", "prompt", "pair"] = "rule"
    """What counts the same: every pair (label), or every prompt however many pairs it has. rule: prompts for the rule
    all-above-gap, pairs for the others. Weights have mean 1."""
    preference_prob: Literal["none", "bradley-terry"] = "none"
    """Soft labels: the column preference_prob = sigmoid(reward_gap / preference_scale); use gap_filter none with it."""
    preference_scale: Annotated[float, Field(gt=0)] = 1.0
    """Rewards per nat of preference: 1 for a reward model trained with the Bradley-Terry loss."""

    gap_filter: Literal["both", "absolute", "scaled", "none"] = "both"
    """A gap is small when it is below min_gap (absolute), below min_gap_sd standard deviations (scaled), or both."""
    min_gap: Annotated[float, Field(ge=0)] = 0.5
    """Smallest reward_gap that is kept, in units of the reward."""
    min_gap_sd: Annotated[float, Field(ge=0)] = 0.25
    """Smallest reward_gap that is kept, in standard deviations of the gaps that the rule found."""
    min_chosen_quantile: Share = 0.0
    """Drop pairs whose chosen reward is below this quantile of chosen rewards: both completions are bad."""
    truncated_chosen: Choice = "drop"
    """A pair whose chosen completion hit max_tokens teaches not to stop: drop it, or keep."""
    truncated_rejected: Choice = "keep"
    """A pair whose rejected completion hit max_tokens: drop it, or keep."""
    max_length_difference: Count = 0
    """Most tokens between the lengths of chosen and rejected; 0 for no limit."""
    max_length_ratio: Annotated[float, Field(ge=0)] = 0.0
    """Longest side over shortest side, in tokens, that is kept; 0 for no limit."""
    near_identical_tokens: Count = 0
    """Drop pairs that so few token edits turn into each other; 0 drops identical texts only."""
    near_identical_share: Share = 0.0
    """Drop pairs whose token edits are at most this share of the longer side."""
    contradictions: Choice = "drop"
    """Pairs of a prompt that contradict each other (A over B and B over A, or in a circle; by text): drop, or keep."""
    subset: Literal["all", "small-implicit-gap", "large-dual-margin", "clear-reference"] = "all"
    """Keep subset_share of the pairs: smallest implicit-reward gap, largest sum of both margins, clearest reference."""
    subset_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the pairs that `subset` keeps."""

    special_tokens: Choice = "drop"
    """A completion whose text spells control tokens (<|im_end|>, [INST], </s>): drop, or keep."""
    refusals: Choice = "keep"
    """A completion that begins as a refusal ("I'm sorry, but I can't"): drop, or keep."""
    max_repetition: Share = 1.0
    """Largest share of a completion's word 4-grams that repeat an earlier one; 1 for no limit."""
    languages: tuple[str, ...] = ()
    """Keep completions in these languages only (codes like en, de; by py3langid, extra `rewards`); none keeps all."""
    min_tokens: Count = 0
    """Shortest completion, in tokens."""
    max_tokens: Count = 0
    """Longest completion, in tokens; 0 for no limit."""

    duplicate_prompts: Choice = "drop"
    """Prompts whose texts are equal but for case and spaces: keep the first by id and drop the others, or keep all."""
    near_duplicate_prompts: Share = 0.0
    """Drop prompts whose word 3-grams overlap with an earlier prompt's by this Jaccard similarity; 0 for off."""
    contamination: Annotated[tuple[str, ...], PATH] = ()
    """Benchmark files (.txt with a text per line, .jsonl, .parquet): prompts that share word n-grams are dropped."""
    contamination_ngram: Annotated[int, Field(ge=1)] = 13
    """Words in an n-gram of the contamination check; shorter texts are compared whole."""

    label_rule: Literal["mean", "median", "threshold", "quantile", "thumbs", "pairs"] = "mean"
    """Labels: above the prompt's mean or median, a threshold, upper and lower quantile, the sign, or sides of pairs."""
    label_threshold: float = 0.5
    """Label rule threshold: desirable when the reward is at least this."""
    label_quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Label rule quantile: the upper share is desirable, the lower undesirable, the rest a dead zone."""
    kl_bank_rows: Annotated[int, Field(ge=1)] = 256
    """Rows of mismatched prompt and completion for KTO's reference point."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """Beta of the training to come, for check D13 of the data report."""
    strict: Annotated[bool, RUNTIME] = False
    """Exit 3 when a check of the data report warns."""
