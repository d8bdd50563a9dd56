"""Rows of a run by id, by an SQL condition, the worst ones; what belongs beside them."""

import shutil
from pathlib import Path

import pytest

from prefpipe.config.train import TrainConfig
from prefpipe.errors import MissingInputError, UsageError
from prefpipe.runs import store
from prefpipe.schemas import Margin, to_table
from prefpipe.views import rows, run_view
from prefpipe.views.rows import RowQuery
from tests.views.conftest import LETTERS


def ask(run_dir: Path, **query: object):
    return rows.selected(run_view.view(run_dir), RowQuery(**query))  # type: ignore[arg-type]


def test_completions_have_their_prompt_and_every_reward(runs: Path) -> None:
    name, found = ask(runs / "g", limit=100)
    assert (name, found.height) == ("completions", 18)
    assert found[LETTERS].null_count() == found["short_sentence"].null_count() == found["prompt"].null_count() == 0
    assert all("Tell me about" in turns[-1]["content"] for turns in found["prompt"])


def test_an_sql_condition_keeps_the_rows_that_fulfil_it(runs: Path) -> None:
    _, every = ask(runs / "g", limit=100)
    _, some = ask(runs / "g", where=f'"{LETTERS}" < 0.2 AND sample_index > 0')
    expected = [r["completion_id"] for r in every.iter_rows(named=True) if r[LETTERS] < 0.2 and r["sample_index"] > 0]
    assert some["completion_id"].to_list() == expected


@pytest.mark.parametrize(
    "where", ["nope > 1", "((", "prompt > 1", "1", "SELECT 1", "; drop", "sample_index > 'a'", "text +"]
)
def test_a_condition_that_cannot_be_answered_is_one_error(runs: Path, where: str) -> None:
    with pytest.raises(UsageError, match="--where") as error:
        ask(runs / "g", where=where)
    assert "completion_id" in error.value.hint


def test_the_worst_rows_come_first(runs: Path) -> None:
    _, every = ask(runs / "p", limit=100)
    _, worst = ask(runs / "p", worst=2)
    assert worst["reward_gap"].to_list() == sorted(every["reward_gap"].to_list())[:2]
    _, completions = ask(runs / "g", worst=3)
    assert completions[LETTERS].to_list() == sorted(ask(runs / "g", limit=100)[1][LETTERS].to_list())[:3]
    with pytest.raises(UsageError, match="worst"):
        ask(runs / "g", dataset="prompts", worst=1)


def test_margins_come_with_the_texts_of_their_pairs(runs: Path, tmp_path: Path) -> None:
    _, pairs = ask(runs / "p", limit=100)
    keys = [*pairs["pair_id"].to_list(), "of a file"]
    margins = [Margin(key, 0, False, 3, 1.0 - number) for number, key in enumerate(keys)]
    config = TrainConfig(pairs=[str(runs / "p"), str(tmp_path / "gone")])
    with store.open_run(tmp_path / "t", "train", config, {}, force=False) as run:
        run.write_part("margins", Margin, 0, to_table(Margin, margins))
    name, worst = ask(tmp_path / "t", worst=2)
    assert (name, worst["row_id"].to_list()) == ("margins", [*keys[::-1]][:2])
    assert worst["chosen"].to_list() == [None, pairs["chosen"].to_list()[-1]]
    shutil.rmtree(tmp_path / "t")
    with store.open_run(tmp_path / "t", "train", TrainConfig(), {}, force=False) as run:
        run.write_part("margins", Margin, 0, to_table(Margin, margins))
    assert "chosen" not in ask(tmp_path / "t", worst=2)[1].columns


def test_a_row_is_found_by_the_beginning_of_its_id_in_any_dataset(runs: Path) -> None:
    _, pairs = ask(runs / "p", limit=1)
    assert ask(runs / "p", row=pairs["pair_id"][0][:12])[1]["pair_id"].to_list() == pairs["pair_id"].to_list()
    name, found = ask(runs / "g", row=pairs["chosen_completion_id"][0])
    assert (name, found.height) == ("completions", 1)
    with pytest.raises(MissingInputError, match="no row with the id"):
        ask(runs / "g", row="no-such-id")


@pytest.mark.parametrize(
    ("dataset", "near"), [("completion", "completions"), ("rewards/short", "rewards/short_sentence")]
)
def test_an_unknown_dataset_names_a_near_one_and_all(runs: Path, dataset: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{near}'") as error:
        ask(runs / "g", dataset=dataset)
    assert "ref_logps" in error.value.hint


def test_only_committed_shards_are_read(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "p", tmp_path / "p")
    (tmp_path / "p/manifest.json").unlink()
    (tmp_path / "p/pairs/part-00001.parquet").write_bytes(b"half a file")
    assert ask(tmp_path / "p", limit=100)[1].height == ask(runs / "p", limit=100)[1].height
