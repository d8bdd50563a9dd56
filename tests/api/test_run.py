"""A run as an object: its rows, numbers and state, checked against their digests."""

from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

import prefpipe
from prefpipe.errors import DataError, MissingInputError, UsageError
from tests.conftest import ROOT, Call


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> prefpipe.Run:
    """Samples of three prompts, two each."""
    return prefpipe.generate(
        model=tiny_model, prompts=ROOT / "data" / "prompts.jsonl", engine="fake", num_samples=2, limit=3, max_tokens=8,
        rewards=["length", "short_sentence"], out=tmp_path_factory.mktemp("runs") / "<b>g</b>",
    )  # fmt: skip


def test_its_rows_are_frames(run: prefpipe.Run) -> None:
    assert run.datasets == [
        "completions",
        "dropped",
        "prompts",
        "ref_logps",
        "rewards/length",
        "rewards/short_sentence",
    ]
    table, frame = run.arrow("completions"), run.polars("completions")
    assert isinstance(table, pa.Table)
    assert table.num_rows == frame.height == 6
    assert table.column_names == frame.columns
    assert run.polars().equals(frame)  # what people come for
    joined = run.polars("completions", joined=True)
    assert set(joined.columns) - set(frame.columns) == {"prompt", "length", "short_sentence"}
    rewards = run.polars("rewards/length").sort("completion_id")["reward"]
    assert joined.sort("completion_id")["length"].to_list() == rewards.to_list()
    assert run.polars("dropped").is_empty()


def test_its_rows_are_a_dataset_of_hugging_face(run: prefpipe.Run) -> None:
    pytest.importorskip("datasets")
    found = run.to_datasets("completions")
    assert found.column_names == run.arrow("completions").column_names
    assert found["text"][:] == run.polars("completions")["text"].to_list()


def test_it_says_what_it_is(run: prefpipe.Run) -> None:
    assert (run.command, run.state) == ("generate", "complete")
    assert run.manifest["digest"] == run.digest
    assert run.config["num_samples"] == 2
    assert run.totals["completions"] == 6
    assert repr(run).startswith(f"<prefpipe generate '{run.path}': complete, 6 completions of 3 prompts")
    page = run._repr_html_()  # what a notebook calls
    assert "completions (6)" in page
    assert "<b>" not in page
    assert "&lt;b&gt;g" in page
    assert Path(run) == run.path


def test_its_numbers_are_a_frame(run: prefpipe.Run, call: Call, tmp_path: Path) -> None:
    (numbers,) = run.metrics.to_dicts()
    assert numbers["completions"] == 6
    assert numbers["mean_reward.length"] == run.polars("rewards/length")["reward"].mean()
    (tmp_path / "config.json").write_text('{"command": "train", "config": {}}')
    assert prefpipe.load(tmp_path).metrics.is_empty()
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1}\n{"step": 1, "loss": 0.5, "eval_loss": 2.5}\n')
    metrics = prefpipe.load(tmp_path).metrics
    assert metrics["loss"].to_list() == [1.0, 0.5]
    assert metrics["eval_loss"].to_list() == [None, 2.5]


def test_rounds_are_rows(tmp_path: Path) -> None:
    assert prefpipe.api.run._cells({"round": 1, "greedy": {"pass": 0.5}, "alerts": ["A1"]}) == {  # type: ignore[attr-defined]
        "round": 1, "greedy.pass": 0.5, "alerts": '["A1"]',
    }  # fmt: skip


def test_a_name_that_is_not_there(run: prefpipe.Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no dataset 'completion' \(did you mean 'completions'\?\)"):
        run.polars("completion")
    with pytest.raises(MissingInputError, match="does not exist"):
        prefpipe.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no run of prefpipe"):
        prefpipe.load(tmp_path)


@pytest.mark.parametrize("complete", [True, False])
def test_a_damaged_file_is_not_read(complete: bool, tiny_model: Path, prompts_file: Path, tmp_path: Path) -> None:
    """Of a complete run by the manifest, of another by the commit record."""
    made = prefpipe.generate(model=tiny_model, prompts=prompts_file, engine="fake", limit=2, out=tmp_path / "g")
    if not complete:
        (made.path / "manifest.json").unlink()
    found = prefpipe.load(made)
    assert found.state == ("complete" if complete else "unfinished")
    assert isinstance(found.polars("completions"), pl.DataFrame)
    if not complete:
        with pytest.raises(MissingInputError, match="is unfinished: it has no manifest"):
            _ = found.manifest
    part = made.path / "completions" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    for read in (found.arrow, found.polars, found.to_datasets):
        with pytest.raises(DataError, match=r"part-00000\.parquet is damaged\nhint: make"):
            read("completions")
