"""Which rows run together: the padding that they may cost, and what must not share a batch."""

from hypothesis import given
from hypothesis import strategies as st

from prefpipe.forward.separate_rows import batches

LENGTHS = st.lists(st.integers(1, 3000), min_size=1, max_size=40)


@given(LENGTHS, st.lists(st.integers(1, 3000), max_size=2))
def test_every_row_runs_once_in_a_batch_that_is_nearly_full(lengths: list[int], edges: list[int]):
    found = batches(lengths, edges)
    assert sorted(row for batch in found for row in batch) == list(range(len(lengths)))
    for batch in found:
        tokens, padded = sum(lengths[row] for row in batch), len(batch) * max(lengths[row] for row in batch)
        assert padded <= 1.05 * tokens + 1e-9
        assert padded <= 2048 or len(batch) <= 2
        for edge in edges:
            assert len({lengths[row] > edge for row in batch}) == 1


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 500))
def test_two_completions_cost_at_most_2_1_shared_rows(prompt: int, first: int, second: int):
    lengths = [prompt + first, prompt + second]
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches(lengths))
    assert padded <= 2.1 * (prompt + first + second)


def test_similar_lengths_run_together():
    assert batches([10, 100, 95, 10, 40]) == [[1, 2], [4], [0, 3]]
    assert batches([100, 95], edges=[97]) == [[0], [1]]
    assert batches([100, 95], edges=[100]) == batches([100, 95], edges=[94]) == [[0, 1]]
    assert batches([1500, 1500, 1500]) == [[0, 1], [2]]
    assert batches([]) == []
