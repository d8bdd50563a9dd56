"""Every check has data that makes it warn and data that does not; numbers by hand."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import polars as pl
import pytest

from prefpipe.stages.build_pairs import data_report
from prefpipe.stages.build_pairs.data_report import NOTICE, OK, WARN, Data
from prefpipe.stages.build_pairs.label_rules import balance

NUM = 6000


def facts(count: int = NUM, **columns: Any) -> pl.DataFrame:
    """Pairs that a careful person likes: unique prompts, equal lengths, mixed hardness."""
    source = random.Random(0)
    lengths = [source.randint(20, 60) for _ in range(2 * count)]
    values: dict[str, Any] = {
        "prompt_id": [f"p{n}" for n in range(count)],
        "chosen_reward": [1 + source.random() for _ in range(count)],
        "rejected_reward": [source.random() for _ in range(count)],
        "chosen_tokens": lengths[:count],
        "rejected_tokens": lengths[count:],
        "chosen_finish_reason": "stop",
        "rejected_finish_reason": "stop",
        "ref_chosen_logps": [-source.uniform(0.5, 1.5) * t for t in lengths[:count]],
        "ref_rejected_logps": [-source.uniform(0.5, 1.5) * t for t in lengths[count:]],
        "chosen_policy": "w",
        "rejected_policy": "w",
    }
    frame = pl.DataFrame({**values, **columns})
    return frame.with_columns(reward_gap=pl.col("chosen_reward") - pl.col("rejected_reward"))


def sample(count: int = 60, **columns: Any) -> pl.DataFrame:
    source = random.Random(1)

    def ids() -> list[int]:
        return [source.randint(10, 5000) for _ in range(20)] + [2]

    def text() -> str:
        return " ".join(source.choices(["tide", "moss", "harp", "owl", "rain", "salt"], k=12)) + "."

    values: dict[str, Any] = {
        "pair_id": [f"{n:032x}" for n in range(count)],
        "prompt_id": [f"p{n}" for n in range(count)],
        "prompt_token_ids": [[1, 100 + n, 7, 8, 9] for n in range(count)],
        "prompt": [f"user: tell me number {n} of many" for n in range(count)],
        "chosen_text": [text() for _ in range(count)],
        "rejected_text": [text() for _ in range(count)],
        "chosen_ids": [ids() for _ in range(count)],
        "rejected_ids": [ids() for _ in range(count)],
    }
    return pl.DataFrame({**values, **columns})


GOOD = Data(facts(), sample(), {}, NUM, 0.1)


def test_good_data_is_ok_everywhere() -> None:
    checks = data_report.report(GOOD)
    assert {c.id: c.level for c in checks} == {f"D{n}": OK for n in range(1, 15) if n != 12}
    assert len(data_report.table(checks)) == 13


def ids(texts: list[list[int]]) -> pl.Series:
    return pl.Series(texts, dtype=pl.List(pl.Int64))


CHOSEN_IDS = sample()["chosen_ids"].to_list()
LOW = pl.Series([0.0] * 1000 + [1.0] * (NUM - 1000))  # a sixth of the pairs is bad on both sides
CASES: list[tuple[str, str, Callable[[], Data]]] = [
    ("D1", NOTICE, lambda: replace(GOOD, dropped={"small_gap": 2000})),
    ("D2", WARN, lambda: replace(GOOD, sample=sample(rejected_ids=[[*r[:-2], 9, 2] for r in CHOSEN_IDS]))),
    ("D3", WARN, lambda: replace(GOOD, dropped={"contradiction": 200})),
    ("D4", WARN, lambda: replace(GOOD, facts=facts(ref_rejected_logps=-999.0))),
    ("D4", NOTICE, lambda: replace(GOOD, facts=facts(ref_chosen_logps=-999.0))),
    ("D4", NOTICE, lambda: replace(GOOD, facts=facts(ref_chosen_logps=pl.Series([None] * NUM, dtype=pl.Float64)))),
    ("D5", WARN, lambda: replace(GOOD, facts=facts(prompt_id=[f"p{n % 2000}" for n in range(NUM)]))),
    ("D5", WARN, lambda: replace(GOOD, facts=facts(prompt_id=["p" if n < 100 else f"p{n}" for n in range(NUM)]))),
    ("D6", WARN, lambda: replace(GOOD, facts=facts(499))),
    ("D6", WARN, lambda: replace(GOOD, facts=facts(1999))),
    ("D6", NOTICE, lambda: replace(GOOD, facts=facts(4999))),
    ("D7", WARN, lambda: replace(GOOD, facts=facts(chosen_tokens=[40] * NUM, rejected_tokens=[39] * NUM))),
    ("D7", WARN, lambda: replace(GOOD, facts=facts(chosen_tokens=[t * 2 for t in facts()["rejected_tokens"]]))),
    ("D8", WARN, lambda: replace(GOOD, facts=facts(chosen_reward=LOW + 0.01, rejected_reward=LOW))),
    ("D9", WARN, lambda: replace(GOOD, facts=facts(rejected_finish_reason=["length", *["stop"] * 9] * (NUM // 10)))),
    ("D10", WARN, lambda: replace(GOOD, sample=sample(chosen_text=["Sure! " + t for t in sample()["chosen_text"]]))),
    ("D11", WARN, lambda: replace(GOOD, facts=facts(rejected_policy="small"))),
    ("D11", WARN, lambda: replace(GOOD, facts=facts(ref_chosen_logps=-999.0))),
    ("D11", NOTICE, lambda: replace(GOOD, facts=facts(ref_chosen_logps=pl.Series([None] * NUM, dtype=pl.Float64)))),
    ("D12", NOTICE, lambda: replace(GOOD, balance=balance(100, 900))),
    ("D13", WARN, lambda: replace(GOOD, beta=5.0)),
    ("D13", WARN, lambda: replace(GOOD, beta=0.001)),
    ("D14", WARN, lambda: replace(GOOD, sample=sample(prompt_token_ids=[[1, 1, n, 8, 9] for n in range(60)]))),
    ("D14", WARN, lambda: replace(GOOD, sample=sample(prompt_token_ids=[[1, 5, n] for n in range(60)]))),
    ("D14", WARN, lambda: replace(GOOD, sample=sample(chosen_ids=ids([[7, 8, 9, 5, 2]] * 60)))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "level", "data"), CASES)
def test_a_check_sees_its_fault(name: str, level: str, data: Callable[[], Data]) -> None:
    checks = {c.id: c for c in data_report.report(data())}
    assert checks[name].level == level
    assert checks[name].advice
    lines = data_report.table([checks[name]])
    assert len(lines) == 2
    assert level in lines[0]


def test_every_check_has_a_case() -> None:
    assert {name for name, _, _ in CASES} == {f"D{n}" for n in range(1, 15)}


def test_numbers_by_hand() -> None:
    """Lengths 3 > 1, 2 < 4, 5 = 5: longer in 1 of 2; ratio 10/10; AUC of {3,2,5} over {1,4,5}: (1 + 1 + 2.5) / 9."""
    few = facts(3, chosen_tokens=[3, 2, 5], rejected_tokens=[1, 4, 5])
    numbers = data_report.d7(replace(GOOD, facts=few)).numbers
    assert numbers == pytest.approx({"chosen_longer": 0.5, "ratio": 1.0, "auc": 4.5 / 9})
    beta = data_report.d13(replace(GOOD, facts=few, beta=0.2)).numbers
    assert beta == pytest.approx({"nats": 5.0, "nats_per_token": 1.5, "mean_tokens": 20 / 6})


def test_auc_against_all_comparisons() -> None:
    source = random.Random(3)
    ones, others = ([source.randint(0, 6) for _ in range(n)] for n in (13, 9))
    won = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in ones for b in others)
    assert data_report.auc(pl.Series(ones), pl.Series(others)) == pytest.approx(won / (13 * 9))


def test_the_sample_is_drawn_by_id() -> None:
    source = random.Random(0)
    rows = 4000
    pairs = pl.DataFrame(
        {
            "pair_id": [f"{source.getrandbits(128):032x}" for _ in range(rows)], "prompt_id": ["p"] * rows,
            "prompt_token_ids": [[1]] * rows, "prompt": [[{"role": "user", "content": "x"}]] * rows,
            **{f"{s}_text": ["t"] * rows for s in ("chosen", "rejected")},
            **{f"{s}_token_ids": [[2]] * rows for s in ("chosen", "rejected")},
        }
    )  # fmt: skip
    assert data_report.pair_sample(pairs, rows).height == rows
    drawn = data_report.pair_sample(pairs, 40_000)
    assert 850 < drawn.height < 1150
    assert drawn["pair_id"].max() < "4"  # type: ignore[operator]
