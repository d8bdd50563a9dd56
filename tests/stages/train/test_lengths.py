"""Rows that are longer than the settings or the contexts of the models allow are left out, and counted."""

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from prefpipe.errors import DataError
from prefpipe.ids import ids_digest
from prefpipe.models.policy import resolve
from prefpipe.schemas import Dropped, Pair
from prefpipe.stages.train import lengths
from prefpipe.stages.train.inputs import prepare
from tests.conftest import Call, Write
from tests.stages.train import data
from tests.tiny import make_gpt2

CONTEXT = 96


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with learned positions."""
    return make_gpt2(tmp_path_factory.mktemp("models") / "gpt2", CONTEXT)


def of_length(row: Pair, tokens: int) -> Pair:
    """The pair with a rejected completion that makes prompt and completion this long."""
    ids = [9] * (tokens - len(row.prompt_token_ids))
    return replace(row, rejected_token_ids=ids, rejected_ids_digest=ids_digest(row.prompt_token_ids, ids))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_rows_of_a_file_that_the_positions_do_not_hold_are_left_out(
    gpt2: Path, write: Write, tmp_path: Path, call: Call
) -> None:
    """Prompt and end are 28 tokens: 20 letters between them fit into 96 positions, 200 do not."""
    rows = [{"prompt": f"Say {n}.", "chosen": "a" * n, "rejected": "b" * n} for n in (3, 20, 7, 200)]
    settings = ("--dtype", "float32", "--num-train-epochs", 1, "--audit-rows", 2, "--save-steps", 9)
    run = ("train", "--model", gpt2, *settings, "--pairs")
    done = call(*run, write(*rows), "--out", tmp_path / "out")
    assert done.code == 0, done.stderr
    assert "1 rows are left out because they are too long (first" in done.stderr
    (dropped,) = pq.read_table(tmp_path / "out" / "dropped.parquet").to_pylist()
    assert dropped["reason"] == "too_long"
    assert f"max_length is {CONTEXT}" in dropped["detail"]
    cut = call(*run, write(*rows), "--overlong", "keep_start", "--out", tmp_path / "cut")
    assert cut.code == 0, cut.stderr
    assert pq.read_table(tmp_path / "cut" / "dropped.parquet").num_rows == 0
    none = call(*run, write(rows[-1]), "--out", tmp_path / "none")
    assert none.code == 65
    assert "can be trained on" in none.stderr


def test_rows_of_runs_are_held_to_the_context_in_every_dataset(gpt2: Path, tiny_model: Path, tmp_path: Path) -> None:
    """A row of exactly the context stays; the reference must take the rows as well."""
    bare = data.bare_pairs(4)
    rows = [of_length(bare[0], CONTEXT), of_length(bare[1], CONTEXT + 1), *bare[2:]]
    run = data.write_run(tmp_path / "r", pairs=rows, labels=data.labels_of(rows))
    for model, changes in ((gpt2, {}), (tiny_model, {"reference_model": str(gpt2)})):
        found = prepare(data.config(model, run, **changes))
        assert [row.row_id for row in found.rows] == [rows[i].pair_id for i in (0, 2, 3)]
        assert [(d.id, d.reason) for d in found.dropped] == [(rows[1].pair_id, "too_long")]
        assert f"{CONTEXT + 1} tokens in prompt and completion" in found.dropped[0].detail
    labels = prepare(data.config(gpt2, loss_type=("apo_zero_unpaired",), labels=(str(run),)))
    assert len(labels.rows) == 7
    assert [d.id for d in labels.dropped] == [rows[1].rejected_completion_id]
    assert len(prepare(data.config(tiny_model, run)).rows) == 4


def test_when_no_row_is_left(gpt2: Path, tmp_path: Path) -> None:
    run = data.write_pairs(tmp_path / "r", [of_length(row, CONTEXT + 1) for row in data.bare_pairs(3)])
    with pytest.raises(DataError, match=f"all 3 are longer than the model's context of {CONTEXT} tokens"):
        prepare(data.config(gpt2, run))


def test_limits_and_contexts(gpt2: Path, tiny_model: Path) -> None:
    """The tiny model takes 1024 tokens."""
    models = [resolve(str(tiny_model)), resolve(str(gpt2))]
    assert lengths.context_of(models) == CONTEXT
    assert lengths.context_of([]) is None
    config = data.config(tiny_model, max_length=500, max_prompt_length=30, overlong="keep_start")
    for context, longest in ((None, 500), (1024, 500), (400, 400)):
        found = lengths.limits(config, context)
        assert (found.max_prompt_length, found.max_length, found.overlong) == (30, longest, "keep_start")


def test_without_a_context_every_row_stays() -> None:
    dropped: list[Dropped] = []
    rows = [of_length(row, 5000) for row in data.bare_pairs(2)]
    assert lengths.within(rows, None, dropped) == rows
    assert lengths.within(list[Pair](), 10, dropped) == []
    assert dropped == []
