"""What score reads: inputs are identified by content, and shards are read only when asked for."""

import json
from pathlib import Path

import pytest

from prefpipe import chat as chats
from prefpipe import fsio, sources
from prefpipe.errors import DataError, MissingInputError
from prefpipe.ingest import NO_LIMITS
from prefpipe.sources import Reader


def reader(model: Path, rows: int) -> Reader:
    return Reader(chats.load(model), NO_LIMITS, rows, rated=False)


def write(path: Path, count: int) -> Path:
    rows = ({"prompt": f"Q{i}", "chosen": "Yes.", "rejected": f"No {i}."} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_is_cut_into_shards_of_rows(tiny_model: Path, tmp_path: Path) -> None:
    found = list(sources.shards(str(write(tmp_path / "p.jsonl", 7)), reader(tiny_model, 3)))
    assert [names for names, _ in found] == [("prompts", "completions", "pairs")] * 3
    batches = [read() for _, read in found]
    assert [len(b.rows["pairs"]) for b in batches] == [3, 3, 1]
    assert all(
        {s.completion_id for s in b.sequences} == {c.completion_id for c in b.rows["completions"]} for b in batches
    )


def test_nothing_is_tokenised_before_it_is_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    """The second row is faulty: it hurts only who reads its shard."""
    path = write(tmp_path / "p.jsonl", 1)
    path.write_text(path.read_text() + '{"prompt": "Q", "chosen": 3, "rejected": "No."}\n')
    (_, good), (_, bad) = sources.shards(str(path), reader(tiny_model, 1))
    assert len(good().sequences) == 2
    with pytest.raises(DataError, match="line 2: field 'chosen' is neither"):
        bad()


def test_an_empty_file_and_an_empty_run_are_errors(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(DataError, match="has no rows"):
        list(sources.shards(str(tmp_path / "p.jsonl"), reader(tiny_model, 1)))
    (tmp_path / "run").mkdir()
    with pytest.raises(MissingInputError, match="holds no complete run"):
        list(sources.shards(str(tmp_path / "run"), reader(tiny_model, 1)))


def test_a_file_is_identified_by_its_bytes_and_a_remote_one_by_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", 1)
    assert sources.digest(str(path)) == fsio.file_digest(path)
    assert sources.digest("hf://datasets/o/n@v1/f.parquet") == "hf://datasets/o/n@v1/f.parquet"
