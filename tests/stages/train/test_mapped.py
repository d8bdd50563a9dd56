"""Views of record batches against the rows they were made of, and numbers about rows against a count in Python."""

import random

import numpy as np
import pytest

from prefpipe.stages.train import mapped
from prefpipe.stages.train.examples import (
    TrainCompletion,
    TrainGroup,
    TrainLabel,
    TrainPair,
    TrainRow,
    has_ref_logps,
)
from prefpipe.stages.train.mapped import Rows
from prefpipe.stages.train.micro_batches import tree_of
from prefpipe.stages.train.record_batches import Batch, encode


def random_row(number: int, source: random.Random) -> TrainRow:
    """A row of any kind with few tokens, so that completions share their starts; some without values, some masked."""

    def ids(longest: int) -> tuple[int, ...]:
        return tuple(source.randrange(4) for _ in range(source.randint(1, longest)))

    def completion(place: int) -> TrainCompletion:
        tokens = ids(6)
        mask = tuple(source.random() < 0.8 for _ in tokens) if source.random() < 0.3 else None
        scored = len(tokens) if mask is None else sum(mask)
        values = tuple(float(np.float32(-source.random())) for _ in range(scored))
        return TrainCompletion(f"c{number}.{place}", tokens, None if source.random() < 0.1 else values, mask)

    kind, prompt = source.randrange(3), ids(4)
    if kind == 0:
        a, b = completion(0), completion(1)
        gap, prob = (source.choice([None, 0.5]) for _ in range(2))
        return TrainPair(
            f"r{number}", a.completion_id, b.completion_id, prompt, a.token_ids, b.token_ids, a.ref_logps, b.ref_logps,
            source.random(), prob, gap, number % 3, a.mask, b.mask,
        )  # fmt: skip
    if kind == 1:
        return TrainLabel(f"r{number}", prompt, completion(0), source.choice([True, False, None]), 1.0, number % 2)
    return TrainGroup(f"r{number}", prompt, tuple(completion(n) for n in range(source.randint(1, 4))), 2.0, 1)


ROWS = [random_row(number, source) for source in [random.Random(0)] for number in range(300)]
VIEW = Rows([Batch(encode(ROWS[:100])), Batch(encode(ROWS[100:]))])


def test_a_view_has_the_rows_it_was_made_of() -> None:
    assert list(VIEW) == ROWS
    assert ROWS == VIEW  # as one list equals another
    assert ROWS[:-1] != VIEW
    assert VIEW[-1] == ROWS[-1]
    with pytest.raises(IndexError):
        VIEW[300]
    part = VIEW[7:250:3]
    assert list(part) == ROWS[7:250:3]
    assert part[:] is part
    assert part.select(np.array([5, 1, 1])) == part.select([5, 1, 1])
    assert list(part.select([5, 1, 1])) == [ROWS[22], ROWS[10], ROWS[10]]
    assert mapped.ids(part, np.array([0, 80])).to_pylist() == ["r7", "r247"]
    assert list(mapped.keys(part)) == [(row.row_id, row.source) for row in part]


def test_views_are_chained_without_a_copy() -> None:
    """Overlapping parts of one file, parts of another one, and no part of a third."""
    other = Rows([Batch(encode(ROWS[:9]))])
    found = mapped.chain(VIEW[50:150], VIEW[:20], other[3:], VIEW[:0], other)
    assert isinstance(found, Rows)
    assert len(found.batches) == 3
    assert list(found) == [*ROWS[50:150], *ROWS[:20], *ROWS[3:9], *ROWS[:9]]
    assert list(mapped.chain(ROWS[:2], VIEW[5:6])) == [*ROWS[:2], ROWS[5]]


@pytest.mark.parametrize("rows", [VIEW, ROWS, VIEW[20:280:7]], ids=["view", "list", "part"])
def test_numbers_about_rows_are_those_of_the_rows(rows: "Rows | list[TrainRow]") -> None:
    trees = [tree_of(row) for row in rows]
    expected = {
        Batch.num_tokens: [tree.num_tokens for tree in trees],
        Batch.longest_sequence: [tree.longest_sequence for tree in trees],
        Batch.num_scored: [sum(tree.num_scored) for tree in trees],
        Batch.num_completions: [len(row.completions) for row in rows],
        Batch.completion_tokens: [sum(len(c.token_ids) for c in row.completions) for row in rows],
        Batch.largest_id: [max(*tree.prompt, *(i for c in tree.completions for i in c), 0) for tree in trees],
        Batch.has_refs: [has_ref_logps(row) for row in rows],
        Batch.desirable: [bool(getattr(row, "desirable", False)) for row in rows],
        Batch.sources: [row.source for row in rows],
    }
    for of, numbers in expected.items():
        assert mapped.column(rows, of).tolist() == numbers, of.__name__


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, False),
        ({"prompt_ids": ()}, True),
        ({"completion": TrainCompletion("c", (), ())}, True),
        ({"completion": TrainCompletion("c", (1, 2), (-1.0, -2.0), (False, False))}, True),
        ({"completion": TrainCompletion("c", (1, 2), (-1.0,))}, True),
        ({"completion": TrainCompletion("c", (1, 2), (-1.0,), (False, True))}, False),
        ({"completion": TrainCompletion("c", (1, 2), (-1.0, float("nan")))}, True),
        ({"completion": TrainCompletion("c", (1, 2), (-1.0, 0.5))}, True),
        ({"completion": TrainCompletion("c", (1, 2), None)}, False),
    ],
)
def test_a_row_that_the_audit_would_refuse_is_suspicious(change: dict[str, object], expected: bool) -> None:
    values = {"prompt_ids": (3,), "completion": TrainCompletion("c", (1, 2), (-1.0, -2.0)), **change}
    row = TrainLabel("r", values["prompt_ids"], values["completion"], True, 1.0)  # type: ignore[arg-type]
    good = TrainLabel("g", (3,), TrainCompletion("c", (1,), (-1.0,)), True, 1.0)
    assert mapped.column([good, row, good], Batch.suspicious).tolist() == [False, expected, False]


def test_prompts_are_numbered_in_the_order_of_their_token_ids() -> None:
    """Of a list, of two batches, and of a part of them, whose prompts alone are counted."""
    prompts = [(256,), (1, 70000), (1,), (255, 3), (1, 2), (70000,), (1,), ()]
    rows = [TrainLabel(str(n), p, TrainCompletion("c", (1,), None), True, 1.0) for n, p in enumerate(prompts)]
    view = Rows([Batch(encode(rows[:3])), Batch(encode(rows[3:]))])
    for given, numbers in ((rows, range(8)), (view, range(8)), (view.select([6, 0, 5, 2]), (6, 0, 5, 2))):
        order = sorted({prompts[n] for n in numbers})
        assert mapped.prompt_numbers(given).tolist() == [order.index(prompts[n]) for n in numbers]
    assert mapped.prompt_numbers(view.select([7, 7])).tolist() == [0, 0]
    assert mapped.prompt_numbers(Rows([Batch(encode(rows[7:]))])).tolist() == [0]  # no token at all


def test_ids_come_in_order() -> None:
    places = np.arange(0, 243, 2)
    for rows in (VIEW[7:250], ROWS[7:250]):
        found = mapped.in_order_of_ids(rows, places).tolist()
        assert found == sorted(places.tolist(), key=lambda place: rows[place].row_id)


def test_rows_have_all_reference_values_or_none() -> None:
    assert not any(c.ref_logps for row in mapped.all_or_none(VIEW) for c in row.completions)
    assert not any(c.ref_logps for row in mapped.all_or_none(ROWS) for c in row.completions)
    known = VIEW.select([n for n, row in enumerate(ROWS) if has_ref_logps(row)])
    assert mapped.all_or_none(known) is known
