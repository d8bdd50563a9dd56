"""Completion filters by hand, partitions, and what the sources refuse."""

from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from prefpipe.errors import DataError
from prefpipe.stages.build_pairs import candidates, prompt_filters
from prefpipe.stages.build_pairs.candidates import CandidatePartition, open_sources, read, select
from tests.runs.cases import rewrite
from tests.stages.build_pairs.runs import REWARD, Row, run_of, settings

NONE = pl.DataFrame(schema=prompt_filters.SCHEMA)


def selected(tmp_path: Path, rows: list[Row], **changes: Any) -> CandidatePartition:
    config = settings(run_of(tmp_path / "g", rows), **changes)
    sources = open_sources(config)
    (keys,), _ = read(sources, config, 1, tmp_path / "keys")
    return select(keys.collect(), NONE, sources, config)


@pytest.mark.parametrize(
    ("row", "changes", "reason"),
    [
        (Row("p", "x", 1.0, " \n\t"), {}, "empty"),
        (Row("p", "x", 1.0, "hi <|im_end|>"), {}, "special_tokens"),
        (Row("p", "x", 1.0, "hi <|im_end|>"), {"special_tokens": "keep"}, None),
        (Row("p", "x", None, "hi <|im_end|>"), {}, "no_reward"),
        (Row("p", "x", 1.0, "I'm sorry, but I can't help."), {}, None),
        (Row("p", "x", 1.0, "I'm sorry, but I can't help."), {"refusals": "drop"}, "refusal"),
        (Row("p", "x", 1.0, "la la la la la la la"), {"max_repetition": 0.5}, "repetition"),
        (Row("p", "x", 1.0, "la la la la la la la"), {"max_repetition": 0.75}, None),
        (Row("p", "x", 1.0, "Das ist ein kurzer Satz auf Deutsch."), {"languages": ["en", "fr"]}, "language"),
        (Row("p", "x", 1.0, "Das ist ein kurzer Satz auf Deutsch."), {"languages": ["en", "de"]}, None),
        (Row("p", "x", 1.0, "17 + 4 = 21"), {"languages": ["fr"]}, None),
        (Row("p", "x", 1.0, "x", num_tokens=4), {"min_tokens": 5}, "too_short"),
        (Row("p", "x", 1.0, "x", num_tokens=4), {"min_tokens": 4, "max_tokens": 4}, None),
        (Row("p", "x", 1.0, "x", num_tokens=4), {"max_tokens": 3}, "too_long"),
    ],
)
def test_a_completion_is_a_candidate_or_has_a_reason(
    tmp_path: Path, row: Row, changes: dict[str, Any], reason: str | None
) -> None:
    found = selected(tmp_path, [row, Row("q", "other", None)], **changes)
    expected = {"other": "no_reward", **({"x": reason} if reason else {})}
    assert dict(found.ledger.select("id", "reason").iter_rows()) == expected
    assert found.candidates.height + found.ledger.height == found.num_in == 2
    assert (found.num_rated, found.num_prompts) == ({REWARD: 2}, 2)


def test_a_dropped_prompt_takes_its_completions_along(tmp_path: Path) -> None:
    rows = [Row("p", "a", 1.0), Row("p", "b", None), Row("q", "c", 1.0)]
    config = settings(run_of(tmp_path / "g", rows))
    sources = open_sources(config)
    (keys,), _ = read(sources, config, 1, tmp_path / "keys")
    faulty = pl.DataFrame([("p", "contaminated", "why")], schema=prompt_filters.SCHEMA, orient="row")
    found = select(keys.collect(), faulty, sources, config)
    assert sorted(found.ledger.rows()) == [
        ("a", "contaminated", "prompt p: why"),
        ("b", "contaminated", "prompt p: why"),
    ]
    assert found.candidates["completion_id"].to_list() == ["c"]


def test_how_many_partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = open_sources(settings(run_of(tmp_path / "g", [Row("p", f"c{n}", 1.0) for n in range(25)])))
    assert sources.num_partitions == 1
    monkeypatch.setattr(candidates, "_ROWS_PER_PARTITION", 10)
    assert sources.num_partitions == 3


@pytest.mark.parametrize("change", ["missing", "type"])
def test_a_file_with_a_missing_column_or_another_type(tmp_path: Path, change: str) -> None:
    """A file of another program: its digest is right, its columns are not."""

    def changed(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index("sample_index")
        other = table.drop_columns("sample_index")
        return other if change == "missing" else other.add_column(place, "sample_index", [["zero"]])

    run = run_of(tmp_path / "g", [Row("p", "c", 1.0)])
    rewrite(run, "completions/part-00000.parquet", changed)
    with pytest.raises(
        DataError, match=r"columns of Completion are missing or of another type: sample_index \(int32\)"
    ):
        open_sources(settings(run))
