"""Labels and their KL bank on disk."""

from collections import Counter
from pathlib import Path

import pytest

from prefpipe.errors import DataError
from prefpipe.runs import store
from prefpipe.schemas import KlBank, Label, from_table
from tests.stages.build_pairs.runs import Row, build, ids_of, ledger_of, logps_of, run_of

ROWS = [Row(f"p{p}", f"p{p}{n}", float(n), f"text {p} {n}", num_tokens=3 + n) for p in range(6) for n in range(4)]


def labels_of(out: Path) -> list[Label]:
    return from_table(Label, store.read_dataset(out, "labels", Label))


def test_labels_carry_ids_and_reference_and_a_bank_of_other_prompts(tmp_path: Path) -> None:
    """Rewards 0 1 2 3: the mean is 1.5. Six prompts of four labels; the bank mixes them."""
    totals = build(tmp_path / "o", run_of(tmp_path / "g", ROWS), output="labels", kl_bank_rows=20)["totals"]
    labels = labels_of(tmp_path / "o")
    assert {r.completion_id: r.label for r in labels} == {r.completion_id: r.reward >= 2 for r in ROWS}  # type: ignore[operator]
    first = next(r for r in labels if r.completion_id == "p00")
    row = ROWS[0]
    assert (first.token_ids, first.ref_logps) == (ids_of(row), logps_of(row, "weights:a").ref_logps)
    assert (first.reference, first.finish_reason, first.weight) == ("weights:a", "stop", 1.0)
    assert first.completion == [{"role": "assistant", "content": "text 0 0"}]
    bank = from_table(KlBank, store.read_dataset(tmp_path / "o", "kl_bank", KlBank))
    owner = {r.completion_id: r.prompt_id for r in ROWS}
    assert len(bank) == 20
    assert all(owner[b.completion_id] != b.prompt_id and b.ref_logps is None for b in bank)
    assert (totals["labels"], totals["desirable"], totals["undesirable_weight"]) == (24, 12, 1.0)
    assert [c["id"] for c in totals["data_report"]] == ["D12"]


def test_labels_from_pairs_say_what_became_of_the_rest(tmp_path: Path) -> None:
    totals = build(
        tmp_path / "o", run_of(tmp_path / "g", ROWS), output="labels", label_rule="pairs", rule="best-worst"
    )["totals"]
    assert totals["levels"]["pairs"] == {"in": 6, "out": 6, "dropped": {}}
    assert totals["levels"]["labels"] == {"in": 24, "out": 12, "dropped": {"unused": 12}}
    assert {r.completion_id: r.label for r in labels_of(tmp_path / "o")} == {
        f"p{p}{n}": n == 3 for p in range(6) for n in (0, 3)
    }
    assert {d.reason for d in ledger_of(tmp_path / "o")} == {"unused"}


def test_prompts_with_labels_of_both_classes_are_counted(tmp_path: Path) -> None:
    """From 2 on: p0 has two of each, p1 one desirable answer, p2 none."""
    run = run_of(tmp_path / "g", [*ROWS[:4], ROWS[7], *ROWS[8:10]])
    totals = build(tmp_path / "o", run, output="labels", label_rule="threshold", label_threshold=2.0)["totals"]
    assert (totals["prompts"], totals["labels"], totals["mixed_prompts"]) == (3, 7, 1)


def test_thumbs_need_both_kinds(tmp_path: Path) -> None:
    run = run_of(tmp_path / "g", [r for r in ROWS if r.reward])
    with pytest.raises(DataError, match="all 18 labels are desirable: KTO needs both"):
        build(tmp_path / "o", run, output="labels", label_rule="thumbs")
    assert not (tmp_path / "o" / "manifest.json").exists()
    assert Counter(d.reason for d in ledger_of(tmp_path / "o")) == {"one_class": 18}


def test_one_prompt_has_no_bank(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least two prompts"):
        build(tmp_path / "o", run_of(tmp_path / "g", ROWS[:4]), output="labels")


def test_prompts_count_the_same(tmp_path: Path) -> None:
    """Four labels of p0 and two of p1, 3 on average: weights 3/4 and 3/2."""
    run = run_of(tmp_path / "g", [*ROWS[:4], *ROWS[4:8:3]])
    build(tmp_path / "o", run, output="labels", weight_by="prompt")
    assert {(r.prompt_id, r.weight) for r in labels_of(tmp_path / "o")} == {("p0", 0.75), ("p1", 1.5)}
