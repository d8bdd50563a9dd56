"""Every check has data that makes it warn and data that does not; numbers by hand."""

from collections.abc import Callable
from dataclasses import replace

import polars as pl
import pytest

from prefpipe.stages.build_pairs import data_report
from prefpipe.stages.build_pairs.data_report import NOTICE, OK, WARN, Data
from prefpipe.stages.build_pairs.label_rules import balance
from prefpipe.stages.build_pairs.reward_values import Spread
from tests.stages.build_pairs.measured import NUM, facts, sample

GOOD = Data(facts(), sample(), {}, NUM, 0.1)


def test_good_data_is_ok_everywhere() -> None:
    checks = data_report.report(GOOD)
    assert {c["id"]: c["level"] for c in checks} == {f"D{n}": OK for n in range(1, 15) if n != 12}
    assert len(data_report.table(checks)) == 13


def ids(texts: list[list[int]]) -> pl.Series:
    return pl.Series(texts, dtype=pl.List(pl.Int64))


def spread(name: str, share: float, missing: int = 0) -> Spread:
    return Spread(name, weight=1.0, sd=1.0, sd_in_prompt=1.0, share=share, missing=missing)


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
    ("D15", NOTICE, lambda: replace(GOOD, spreads=[spread("a", 0.96), spread("b", 0.04)])),
    ("D15", NOTICE, lambda: replace(GOOD, spreads=[spread("a", 0.5), spread("b", 0.5, missing=1)])),
]  # fmt: skip


@pytest.mark.parametrize(("name", "level", "data"), CASES)
def test_a_check_sees_its_fault(name: str, level: str, data: Callable[[], Data]) -> None:
    checks = {c["id"]: c for c in data_report.report(data())}
    assert checks[name]["level"] == level
    assert checks[name]["advice"]
    lines = data_report.table([checks[name]])
    assert len(lines) == 2
    assert level in lines[0]


def test_parts_of_a_sum_are_named_with_their_spread() -> None:
    """Also where there are no pairs: for labels and groups. The advice names the part that does not count."""
    fair, unfair = (
        data_report.report(replace(GOOD, facts=pl.DataFrame(), spreads=[spread("a", 1 - b), spread("b", b, 3)]))
        for b in (0.05, 0.049)
    )
    (check,) = fair
    assert (check["id"], check["numbers"]["b"]["missing"]) == ("D15", 3)
    assert check["found"].endswith("1*b sd 1, in a prompt 1 (5% of the variance), missing for 3")
    assert check["advice"].startswith("completions that lack a part are left out")
    assert unfair[0]["advice"].startswith("b hardly changes which answer is better")


def test_every_check_has_a_case() -> None:
    assert {name for name, _, _ in CASES} == set(data_report.CHECKS) == {f"D{n}" for n in range(1, 16)}
