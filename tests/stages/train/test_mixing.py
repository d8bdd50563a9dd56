"""Shares of sources: counts by hand and by rule, the rows of an epoch, and what weights do to the order of rows."""

from collections import Counter
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefpipe.config import base
from prefpipe.config.train import TrainConfig
from prefpipe.errors import UsageError
from prefpipe.stages.train import mixing
from prefpipe.stages.train.examples import TrainCompletion, TrainLabel, TrainPair, TrainRow
from prefpipe.stages.train.mixing import epoch_batches

WEIGHTS = st.lists(st.integers(1, 50).map(lambda n: n / 10), min_size=1, max_size=4)
LENGTHS = ("all_rows", "first_exhausted", "all_exhausted")


def settings(*weights: float, **changes: Any) -> TrainConfig:
    sources = tuple(f"{n}.jsonl" for n in range(len(weights)))
    return TrainConfig.model_validate({"pairs": sources, "source_weights": weights, "train_batch_size": 4, **changes})


def pairs(*sizes: int) -> list[TrainPair]:
    """So many pairs of each source; the gap of reward falls from row to row, and two rows have one prompt."""
    origins = [source for source, size in enumerate(sizes) for _ in range(size)]
    return [
        TrainPair(f"p{n}", "c", "r", (n // 2,), (1,), (2,), None, None, 1.0, None, -float(n), source)
        for n, source in enumerate(origins)
    ]


@pytest.mark.parametrize(
    ("sizes", "weights", "length", "counts"),
    [
        ((60, 40), (0.6, 0.4), "all_rows", [60, 40]),  # the shares that the sources have by themselves
        ((60, 40), (3, 2), "first_exhausted", [60, 40]),
        ((60, 40), (3, 2), "all_exhausted", [60, 40]),
        ((100, 10), (0.5, 0.5), "all_rows", [55, 55]),
        ((100, 10), (0.5, 0.5), "first_exhausted", [10, 10]),
        ((100, 10), (0.5, 0.5), "all_exhausted", [100, 100]),
        ((6, 100), (0.6, 0.4), "first_exhausted", [6, 4]),  # 0.6 as a float is less than 3/5
        ((5, 5), (2, 1), "all_rows", [7, 3]),  # 6.67 and 3.33
        ((5, 6), (1, 1), "all_rows", [6, 5]),  # 5.5 each: the earlier source is rounded up
        ((10, 10, 10), (1, 2, 4), "first_exhausted", [2, 5, 10]),  # 2.5, 5, 10
    ],
)
def test_counts_by_hand(sizes: tuple[int, ...], weights: tuple[float, ...], length: str, counts: list[int]) -> None:
    assert mixing.counts(sizes, weights, length) == counts


@given(st.data(), WEIGHTS, st.sampled_from(LENGTHS))
def test_counts_are_the_exact_shares_rounded(data: st.DataObject, weights: list[float], length: str) -> None:
    """Every count is its share of one length, rounded down or up; the length is what the setting says."""
    sizes = data.draw(st.lists(st.integers(1, 200), min_size=len(weights), max_size=len(weights)))
    shares = [Fraction(str(w)) / sum(Fraction(str(w)) for w in weights) for w in weights]
    found = mixing.counts(sizes, weights, length)
    used_up = [size / share for size, share in zip(sizes, shares, strict=True)]
    rows = {"all_rows": Fraction(sum(sizes)), "first_exhausted": min(used_up), "all_exhausted": max(used_up)}[length]
    assert sum(found) == rows // 1
    assert all(abs(count - rows * share) < 1 for count, share in zip(found, shares, strict=True))
    if length == "first_exhausted":
        assert all(count <= size for count, size in zip(found, sizes, strict=True))
        assert any(count == size for count, size in zip(found, sizes, strict=True))
    if length == "all_exhausted":
        assert all(count >= size for count, size in zip(found, sizes, strict=True))


@pytest.mark.parametrize("length", LENGTHS)
def test_an_epoch_draws_the_counts_and_the_rows_of_a_source_equally_often(length: str) -> None:
    """Over any number of epochs the counts of two rows of a source differ by one at most, cut or repeated."""
    rows = pairs(7, 20, 5)
    config = settings(0.5, 0.3, 0.2, epoch_length=length)
    counts = mixing.counts((7, 20, 5), (0.5, 0.3, 0.2), length)
    drawn = Counter[int]()
    epochs: list[list[list[int]]] = []
    for epoch in range(5):
        epochs.append(epoch_batches(rows, config, epoch))
        numbers = [number for batch in epochs[-1] for number in batch]
        assert [sum(rows[n].source == source for n in numbers) for source in range(3)] == counts
        assert all(len(batch) == 4 for batch in epochs[-1][:-1])
        drawn.update(numbers)
        for source in range(3):
            times = [drawn[n] for n, row in enumerate(rows) if row.source == source]
            assert max(times) - min(times) <= 1
    assert epochs == [epoch_batches(rows, config, epoch) for epoch in range(5)]
    assert epochs[0] != epochs[1]
    other = config.model_copy(update={"seed": 1})
    assert epoch_batches(rows, other, 0) != epochs[0]


def test_shares_that_the_rows_have_already_change_nothing() -> None:
    rows = pairs(6, 4)
    for length in LENGTHS:
        for changes in ({}, {"group_by_prompt": True}, {"train_order": "hardness"}):
            weighted = settings(0.6, 0.4, epoch_length=length, **changes)
            plain = weighted.model_copy(update={"source_weights": ()})
            assert [epoch_batches(rows, weighted, e) for e in (0, 1)] == [epoch_batches(rows, plain, e) for e in (0, 1)]


def test_a_source_that_is_drawn_twice_is_a_file_that_holds_its_rows_twice() -> None:
    """4 rows and 8, at equal shares until both are used up: the first source twice, each row behind itself."""
    rows = pairs(4, 8)
    by_hand = [row for row in rows[:4] for _ in (0, 1)] + rows[4:]
    config = settings(1, 1, epoch_length="all_exhausted")
    plain = config.model_copy(update={"source_weights": ()})
    for epoch in (0, 1):
        ours = [[rows[n].row_id for n in batch] for batch in epoch_batches(rows, config, epoch)]
        assert ours == [[by_hand[n].row_id for n in batch] for batch in epoch_batches(by_hand, plain, epoch)]


def test_hardness_and_prompts_order_the_rows_that_are_drawn() -> None:
    rows = pairs(3, 8)
    hardness = epoch_batches(rows, settings(1, 1, epoch_length="all_exhausted", train_order="hardness"), 0)
    numbers = [number for batch in hardness for number in batch]
    assert numbers == sorted(numbers)  # the gap falls from row to row
    assert Counter(map(numbers.count, range(3))) == {3: 2, 2: 1}  # 8 draws of 3 rows
    together = epoch_batches(rows, settings(1, 1, epoch_length="all_exhausted", group_by_prompt=True), 0)
    prompts = [rows[number].prompt_ids for batch in together for number in batch]
    assert sum(a != b for a, b in pairwise(prompts)) == len(set(prompts)) - 1


def test_labels_that_are_drawn_keep_the_proportion_of_their_classes_in_every_step() -> None:
    rows: list[TrainRow] = [
        TrainLabel(f"l{n}", (n,), TrainCompletion("c", (1,), None), n % 2 == 0, 1.0, int(n >= 4)) for n in range(12)
    ]
    config = settings(1, 1, epoch_length="all_exhausted").model_copy(update={"loss_type": ("kto",)})
    batches = epoch_batches(rows, config, 0)
    assert [len(batch) for batch in batches] == [4, 4, 4, 4]
    assert [sum(number % 2 for number in batch) for batch in batches] == [2, 2, 2, 2]


def test_a_source_without_a_draw_is_refused() -> None:
    with pytest.raises(UsageError, match=r"pairs\.1 gets no row of an epoch of 10 rows"):
        epoch_batches(pairs(9, 1), settings(0.99, 0.01), 0)
    with pytest.raises(UsageError, match=r"pairs\.1 gets no row"):
        epoch_batches(pairs(9), settings(0.5, 0.5), 0)


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"pairs": ["a", "b"], "source_weights": [1.0]}, "2 pairs but 1 source_weights: give one for each"),
        ({"source_weights": [1.0]}, "0 pairs but 1 source_weights"),
        ({"pairs": ["a", "b"], "source_weights": [1.0, 0.0]}, "greater than 0"),
        ({"pairs": ["a"], "epoch_length": "all_exhausted"}, "is read only with source_weights"),
        (
            {"pairs": ["a", "b"], "source_weights": [1.0, 2.0], "train_order": "given"},
            "train_order = given takes every row once",
        ),
        ({"labels": ["a"], "loss_type": ["kto"], "source_weights": [1.0, 2.0]}, "1 labels but 2 source_weights"),
        ({"groups": ["a"], "loss_type": ["plackett_luce"], "source_weights": [1.0, 2.0]}, "1 groups but 2"),
        ({"pairs": ["a"], "sft_weight": 0.5}, "sft_weight = 0.5 is read only with sft"),
        ({"pairs": ["a"], "sft_batch_size": 2}, "sft_batch_size = 2 is read only with sft"),
        ({"pairs": ["a"], "sft_column": ["prompt=q"]}, "is read only with sft"),
        ({"pairs": ["a"], "loss_weights": [0]}, "every one of loss_weights is 0"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(given_: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        base.load(TrainConfig, None, given_)


def test_rows_to_imitate_come_in_passes_of_all_of_them() -> None:
    """Six steps of 3 of 7 rows: the first 14 draws are each row twice; any step can be asked for alone."""
    drawn = [mixing.sft_rows(7, 3, 0, step) for step in range(6)]
    flat = [row for step in drawn for row in step]
    assert sorted(flat[:7]) == sorted(flat[7:14]) == list(range(7))
    assert flat[:7] != flat[7:14]
    assert mixing.sft_rows(7, 3, 0, 4) == drawn[4]
    assert mixing.sft_rows(7, 3, 1, 0) != drawn[0]
    assert sorted(mixing.sft_rows(2, 5, 0, 0)) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])
    assert mixing.sft_rows(0, 3, 0, 0) == []
