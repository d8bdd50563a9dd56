"""A setting that the chosen output, rule, filter ... does not read is refused, with the choices that would read it."""

from typing import Any, get_args

import pytest

from prefpipe.config import base
from prefpipe.config.build_pairs import READS, RULES, SUBSETS, BuildPairsConfig, unread
from prefpipe.config.names import known
from prefpipe.errors import UsageError

DEFAULTS = dict(BuildPairsConfig())


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"rule": "best-worst", "rule_gap": 0.75},
         "rule_gap = 0.75 is read only with rule = all-above-gap or smallest-gap"),
        ({"rule": "best-worst-of-5", "pairs_per_prompt": 2},
         "pairs_per_prompt = 2 is read only with rule = best-worst or"),
        ({"top_k": 3}, "top_k = 3 is read only with rule = top-bottom"),
        ({"output": "groups", "rule": "best-worst"}, "rule = best-worst is read only with output = pairs or labels"),
        ({"output": "groups", "top_k": 3}, "top_k = 3 is read only with output = pairs or labels"),
        ({"output": "groups", "weight_by": "pair"}, "weight_by = pair is read only with output = pairs or labels"),
        ({"output": "labels", "gap_filter": "none"}, "gap_filter = none is read only with label_rule = pairs"),
        ({"output": "labels", "beta": 1.0}, "beta = 1.0 is read only with output = pairs"),
        ({"label_rule": "median"}, "label_rule = median is read only with output = labels"),
        ({"output": "labels", "label_quantile": 0.1}, "label_quantile = 0.1 is read only with label_rule = quantile"),
        ({"kl_bank_rows": 9}, "kl_bank_rows = 9 is read only with output = labels"),
        ({"output": "labels", "format": "trl", "kl_bank_rows": 9},
         "kl_bank_rows = 9 is read only with format = prefpipe"),
        ({"format": "trl", "weight_by": "pair"}, "weight_by = pair is read only with format = prefpipe"),
        ({"gap_filter": "scaled", "min_gap": 0.1}, "min_gap = 0.1 is read only with gap_filter = both or absolute"),
        ({"gap_filter": "none", "min_gap_sd": 0.1}, "min_gap_sd = 0.1 is read only with gap_filter = both or scaled"),
        ({"subset_share": 0.5}, "subset_share = 0.5 is read only with subset = small-implicit-gap or"),
        ({"policy_logps": ("r",)},
         "policy_logps = ('r',) is read only with subset = small-implicit-gap or large-dual-margin"),
        ({"preference_scale": 2.0}, "preference_scale = 2.0 is read only with preference_prob = bradley-terry"),
        ({"contamination_ngram": 5}, "contamination_ngram = 5 is read only with contamination"),
        ({"subset": "large-dual-margin"}, "subset = large-dual-margin needs log-probs of a trained policy"),
        ({"output": "groups", "format": "trl"}, "TRL has no trainer for ranked groups"),
        ({"cluster": "ray", "workers": 2}, "workers = 2 is not read with cluster"),
    ],
)  # fmt: skip
def test_a_setting_that_nothing_reads_is_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        base.load(BuildPairsConfig, None, settings)
    assert problem in caught.value.message


@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "smallest-gap", "rule_gap": 0.75, "max_length_difference": 5, "seed": 3},
        {"output": "labels", "label_rule": "pairs", "rule": "top-bottom", "top_k": 3, "gap_filter": "none"},
        {"output": "labels", "label_rule": "threshold", "label_threshold": 0.1, "weight_by": "prompt"},
        {"output": "labels", "format": "trl", "truncated_chosen": "keep"},
        {"output": "groups", "truncated_rejected": "drop", "length_penalty": 0.1},
        {"subset": "small-implicit-gap", "subset_share": 0.5, "policy_logps": ("r",)},
        {"preference_prob": "bradley-terry", "preference_scale": 2.0, "gap_filter": "none"},
        {"contamination": ("b.txt",), "contamination_ngram": 5},
        {"cluster": "ray://10.0.0.1:6379", "workers": 1},
    ],
    ids=str,
)
def test_a_setting_that_a_choice_reads_is_taken(settings: dict[str, Any]) -> None:
    loaded = base.load(BuildPairsConfig, None, settings)
    assert all(getattr(loaded, name) == value for name, value in settings.items())


def test_problems_are_named_together() -> None:
    with pytest.raises(UsageError, match=r"rule_gap = .*; top_k = "):
        base.load(BuildPairsConfig, None, {"rule_gap": 0.1, "top_k": 5})


def test_a_row_for_every_value_of_a_choice_and_a_setting_for_every_name() -> None:
    for choice, rows in READS.items():
        field = BuildPairsConfig.model_fields[choice]
        assert set(rows) == set(get_args(field.annotation) or known(field.metadata)), choice
    assert {name for rows in READS.values() for row in rows.values() for name in row} <= set(DEFAULTS)
    assert set(READS["rule"]) == set(RULES)
    assert set(READS["subset"]) == set(SUBSETS)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_leaves_the_settings_of_others_unread(rule: str) -> None:
    known = {name for other in RULES.values() for name in other.reads}
    refused = {name for name in unread({**DEFAULTS, "rule": rule}) if name in known}
    assert refused == known - set(RULES[rule].reads)
