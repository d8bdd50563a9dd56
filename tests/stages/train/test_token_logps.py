"""Log-probs by the id of their completion: a mapping that travels as a table."""

import pickle

import pyarrow as pa
import pytest

from prefpipe.stages.train.token_logps import TokenLogpsById


def table(values: dict[str, list[float]]) -> pa.Table:
    columns = [pa.array(list(values), pa.string()), pa.array(list(values.values()), pa.list_(pa.float32()))]
    return pa.table(columns, names=["completion_id", "token_logps"])


def test_it_is_the_mapping_also_behind_a_pipe() -> None:
    found = TokenLogpsById(table({"a": [-1.0, -0.5], "b": [], "c": [-2.0]}))
    expected = {"a": (-1.0, -0.5), "b": (), "c": (-2.0,)}
    assert found == expected
    assert pickle.loads(pickle.dumps(found)) == expected
    with pytest.raises(KeyError):
        found["d"]
    assert not TokenLogpsById(table({}))


def test_ids_values_and_boundaries_make_the_digest() -> None:
    cases = [{"a": [-1.0, -2.0], "b": [-3.0]}, {"a": [-1.0], "b": [-2.0, -3.0]}, {"b": [-1.0, -2.0], "a": [-3.0]},
             {"a": [-1.0, -2.0], "b": [-3.5]}]  # fmt: skip
    digests = [TokenLogpsById(table(case)).digest for case in cases]
    assert len(set(digests)) == 4
    assert TokenLogpsById(table(cases[0])).digest == digests[0]
