"""Pair filters against a slow oracle: the first reason that applies, and nothing lost."""

import itertools
import math
import random
import statistics
from dataclasses import dataclass
from typing import Any
from unicodedata import normalize

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.stages.build_pairs import filters
from tests.stages.build_pairs.runs import fitting


@dataclass(frozen=True)
class Pair:
    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int
    chosen_finish: str
    rejected_finish: str

    @property
    def gap(self) -> float:
        return self.chosen - self.rejected


FINISH = st.sampled_from(["stop", "length"])
PAIRS = st.lists(
    st.builds(
        Pair, st.sampled_from([1.0, 1.25, 2.0, 5.0]), st.sampled_from([0.0, 0.5, 0.75]), st.integers(1, 9),
        st.integers(1, 9), FINISH, FINISH,
    ), min_size=1, max_size=12,
)  # fmt: skip
CONFIGS = st.fixed_dictionaries(
    {
        "gap_filter": st.sampled_from(["both", "absolute", "scaled", "none"]),
        "min_gap": st.sampled_from([0.0, 0.5, 1.0]),
        "min_gap_sd": st.sampled_from([0.0, 0.25, 2.0]),
        "min_chosen_quantile": st.sampled_from([0.0, 0.3, 1.0]),
        "truncated_chosen": st.sampled_from(["drop", "keep"]),
        "truncated_rejected": st.sampled_from(["drop", "keep"]),
        "max_length_difference": st.sampled_from([0, 2]),
        "max_length_ratio": st.sampled_from([0.0, 1.5]),
    }
)


def config(**changes: Any) -> BuildPairsConfig:
    return BuildPairsConfig.model_validate(fitting({"policy_logps": ("runs/t",), **changes}))


def key_frame(pairs: list[Pair]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "chosen_completion_id": [f"c{n}" for n in range(len(pairs))],
            "rejected_completion_id": [f"r{n}" for n in range(len(pairs))],
            **{f"{s}_reward": [getattr(p, s) for p in pairs] for s in ("chosen", "rejected")},
            **{f"{s}_finish_reason": [getattr(p, f"{s}_finish") for p in pairs] for s in ("chosen", "rejected")},
            "chosen_num_tokens": pl.Series([p.chosen_tokens for p in pairs], dtype=pl.UInt32),
            "rejected_num_tokens": pl.Series([p.rejected_tokens for p in pairs], dtype=pl.UInt32),
            "reward_gap": [p.gap for p in pairs],
        }
    )


def oracle(pair: Pair, everything: list[Pair], c: BuildPairsConfig) -> str | None:
    absolute = pair.gap < c.min_gap
    scaled = pair.gap < c.min_gap_sd * statistics.pstdev([p.gap for p in everything])
    if {"both": absolute and scaled, "absolute": absolute, "scaled": scaled, "none": False}[c.gap_filter]:
        return "small_gap"
    if c.truncated_chosen == "drop" and pair.chosen_finish == "length":
        return "truncated_chosen"
    if c.truncated_rejected == "drop" and pair.rejected_finish == "length":
        return "truncated_rejected"
    lengths = sorted((pair.chosen_tokens, pair.rejected_tokens))
    if c.max_length_difference and lengths[1] - lengths[0] > c.max_length_difference:
        return "length_difference"
    if c.max_length_ratio and lengths[1] > c.max_length_ratio * lengths[0]:
        return "length_ratio"
    rewards = sorted(p.chosen for p in everything)
    lowest = rewards[math.ceil(c.min_chosen_quantile * (len(rewards) - 1))]
    return "both_bad" if c.min_chosen_quantile and pair.chosen < lowest else None


@settings(deadline=None, max_examples=150)
@given(PAIRS, CONFIGS, st.randoms(use_true_random=False))
def test_by_keys_equals_the_oracle_in_any_order(
    pairs: list[Pair], changes: dict[str, Any], source: random.Random
) -> None:
    asked = config(**changes)
    pairs = source.sample(pairs, len(pairs))
    keys = key_frame(pairs)
    judged = filters.by_keys(keys, asked, filters.scale(keys, asked))
    assert judged["reason"].to_list() == [oracle(p, pairs, asked) for p in pairs]
    assert filters.kept(judged).height + filters.ledger(judged).height == len(pairs)


def test_the_gap_of_the_seed_is_kept_and_what_is_below_is_not() -> None:
    """min_gap 0.5 absolute: a gap of exactly 0.5 stays. The default needs both tests to fail.

    Gaps 0.5, 0.25 and 20 have sd 9.25, a quarter is 2.3: with 'scaled' only 20 stays, with 'both' 0.5 and 20.
    """
    pairs = [Pair(g, 0.0, 1, 1, "stop", "stop") for g in (0.5, 0.25, 20.0)]
    keys = key_frame(pairs)
    kept = {
        name: filters.kept(filters.by_keys(keys, c, filters.scale(keys, c)))["reward_gap"].to_list()
        for name, c in ((n, config(gap_filter=n)) for n in ("both", "absolute", "scaled", "none"))
    }
    assert kept == {"both": [0.5, 20.0], "absolute": [0.5, 20.0], "scaled": [20.0], "none": [0.5, 0.25, 20.0]}


def test_standard_deviation_does_not_depend_on_the_order() -> None:
    values = [random.Random(1).gauss(0, 1e6) + 1e-6 * n for n in range(1000)]
    shuffled = random.Random(2).sample(values, len(values))
    assert filters.standard_deviation(values) == filters.standard_deviation(shuffled)
    assert filters.standard_deviation(values) == pytest.approx(statistics.pstdev(values))
    assert filters.standard_deviation([]) == 0.0


TEXTS = ("one", "two", " two ", "caf\u00e9", "cafe\u0301", "three", "four")
CONTENT = st.lists(st.tuples(st.sampled_from("pq"), st.sampled_from(TEXTS), st.sampled_from(TEXTS)), max_size=10)


def content_frame(
    pairs: list[tuple[str, str, str]], ids: list[tuple[list[int], list[int]]] | None = None
) -> pl.DataFrame:
    ids = ids or [([n, 1], [n, 2, 3, 4, 5]) for n in range(len(pairs))]
    return pl.DataFrame(
        {
            "prompt_id": [p for p, _, _ in pairs],
            "chosen_text": [c for _, c, _ in pairs],
            "rejected_text": [r for _, _, r in pairs],
            "chosen_token_ids": [c for c, _ in ids],
            "rejected_token_ids": [r for _, r in ids],
        },
        schema_overrides={
            **dict.fromkeys(("prompt_id", "chosen_text", "rejected_text"), pl.String),
            **dict.fromkeys(("chosen_token_ids", "rejected_token_ids"), pl.List(pl.Int32)),
        },
    )


def contradiction_oracle(pairs: list[tuple[str, str, str]]) -> list[str | None]:
    """A pair lies on a circle when its rejected text beats its chosen text over some chain of other pairs."""
    plain = [(p, normalize("NFC", c).strip(), normalize("NFC", r).strip()) for p, c, r in pairs]
    reasons: list[str | None] = ["identical_text" if c == r else None for _, c, r in plain]
    for prompt_id in {p for p, _, _ in plain}:
        edges = {(c, r) for (p, c, r), why in zip(plain, reasons, strict=True) if p == prompt_id and why is None}
        beats = set(edges)
        for _ in range(len(edges)):
            beats |= {(a, d) for (a, b), (c, d) in itertools.product(beats, edges) if b == c}
        for n, (p, c, r) in enumerate(plain):
            if p == prompt_id and reasons[n] is None and (r, c) in beats:
                reasons[n] = "contradiction"
    return reasons


@settings(deadline=None, max_examples=150)
@given(CONTENT)
def test_by_content_equals_the_oracle(pairs: list[tuple[str, str, str]]) -> None:
    judged = filters.by_content(content_frame(pairs), config())
    assert judged["reason"].to_list() == contradiction_oracle(pairs)


def test_contradictions_can_stay() -> None:
    pairs = [("p", "a", "b"), ("p", "b", "a"), ("q", "a", "b")]
    assert filters.by_content(content_frame(pairs), config())["reason"].to_list() == ["contradiction"] * 2 + [None]
    assert filters.by_content(content_frame(pairs), config(contradictions="keep"))["reason"].null_count() == 3


@pytest.mark.parametrize(
    ("tokens", "share", "dropped"), [(0, 0.0, [0, 0, 0]), (1, 0.0, [1, 0, 0]), (0, 0.25, [1, 1, 0])]
)
def test_near_identical_counts_token_edits(tokens: int, share: float, dropped: list[int]) -> None:
    """One edit of 4, two edits (one replaced, one added) of 8, and nothing in common."""
    ids = [([1, 2, 3, 4], [1, 2, 9, 4]), ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 9, 5, 6, 7, 8]), ([1, 2], [3, 4])]
    frame = content_frame([("p", f"a{n}", f"b{n}") for n in range(3)], ids)
    judged = filters.by_content(frame, config(near_identical_tokens=tokens, near_identical_share=share))
    assert judged["reason"].to_list() == ["near_identical" if d else None for d in dropped]


def scored_frame(source: random.Random, count: int) -> pl.DataFrame:
    logps = {
        f"{s}_{n}": [source.uniform(-90, -5) for _ in range(count)]
        for s in ("chosen", "rejected")
        for n in ("ref_logps", "policy_logps")
    }
    return pl.DataFrame(
        {
            "chosen_completion_id": [f"c{n:03d}" for n in range(count)],
            "rejected_completion_id": [f"r{n:03d}" for n in range(count)],
            **logps,
            "chosen_length": [source.randint(1, 50) for _ in range(count)],
            "rejected_length": [source.randint(1, 50) for _ in range(count)],
            "reward_gap": [source.uniform(0.1, 3) for _ in range(count)],
        }
    )


def unit(values: list[float]) -> list[float]:
    return [(v - min(values)) / (max(values) - min(values)) for v in values]


@pytest.mark.parametrize("name", ["small-implicit-gap", "large-dual-margin", "clear-reference"])
def test_subset_keeps_the_share_that_its_score_puts_first(name: str) -> None:
    for seed in range(5):
        pairs = scored_frame(random.Random(seed), 40)
        rows = list(pairs.iter_rows(named=True))
        implicit = [
            r["chosen_policy_logps"] - r["chosen_ref_logps"] - r["rejected_policy_logps"] + r["rejected_ref_logps"]
            for r in rows
        ]
        dual = [a + b for a, b in zip(unit(implicit), unit([r["reward_gap"] for r in rows]), strict=True)]
        clear = [
            r["chosen_ref_logps"] / r["chosen_length"] - r["rejected_ref_logps"] / r["rejected_length"] for r in rows
        ]
        order = {
            "small-implicit-gap": sorted(range(40), key=lambda n: abs(implicit[n])),
            "large-dual-margin": sorted(range(40), key=lambda n: -dual[n]),
            "clear-reference": sorted(range(40), key=lambda n: -clear[n]),
        }[name]
        judged = filters.subset(pairs, config(subset=name, subset_share=0.25))
        assert [n for n, why in enumerate(judged["reason"]) if why is None] == sorted(order[:10])
        assert set(judged["reason"]) == {None, "not_in_subset"}


def test_without_a_subset_all_stay() -> None:
    assert filters.subset(scored_frame(random.Random(0), 3), config())["reason"].null_count() == 3


def ends(chosen: list[int], rejected: list[int], rejected_finish: str = "stop") -> pl.DataFrame:
    return pl.DataFrame(
        {
            "chosen_last": chosen, "rejected_last": rejected, "chosen_finish_reason": ["stop"] * len(chosen),
            "rejected_finish_reason": [rejected_finish] * len(rejected),
        }
    )  # fmt: skip


def test_an_end_token_on_one_side_only() -> None:
    """All of 50 against none of 50 that ended by themselves is an error; one of 50, or 5 against 5, is not."""
    eos, other = [2] * 50, list(range(100, 150))
    assert filters.end_on_one_side(ends(eos, eos)) is None
    assert (
        filters.end_on_one_side(ends(eos, other))
        == "chosen completions end with token 2, none of 50 rejected ones does"
    )
    assert "rejected completions end with token 2" in (filters.end_on_one_side(ends(other, eos)) or "")
    assert filters.end_on_one_side(ends(eos, [*other[:-1], 2])) is None
    assert filters.end_on_one_side(ends(eos, other, "length")) is None
    assert filters.end_on_one_side(ends(eos[:5], other[:5])) is None
