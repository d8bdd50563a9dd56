"""Duplicate, near-duplicate and contaminated prompts."""

import json
import random
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.errors import DataError, MissingInputError, UsageError
from prefpipe.stages.build_pairs import prompt_filters, texts

WORDS = [f"word{n}" for n in range(400)]


def sentence(seed: int, count: int = 40) -> str:
    return " ".join(random.Random(seed).sample(WORDS, count))


def frame(rows: dict[str, str], role: str = "user") -> pl.LazyFrame:
    messages = [[{"role": role, "content": text}] for text in rows.values()]
    return pl.LazyFrame({"prompt_id": list(rows), "messages": messages})


def faulty(rows: dict[str, str], **changes: Any) -> dict[str, str]:
    found = prompt_filters.dropped_prompts(frame(rows), BuildPairsConfig.model_validate(changes))
    return dict(found.select("prompt_id", "reason").iter_rows())


def test_duplicates_differ_in_case_spaces_and_composition_only() -> None:
    rows = {"b": "Say caf\u00e9", "a": " say  CAFE\u0301\n", "c": "say cafe", "d": "Say caf\u00e9!"}
    assert faulty(rows) == {"b": "duplicate_prompt"}
    assert faulty(rows, duplicate_prompts="keep") == {}


def test_a_role_makes_another_prompt() -> None:
    both = pl.concat([frame({"a": "hi"}), frame({"b": "hi"}, role="system"), frame({"a": "hi"})])
    assert prompt_filters.duplicates(both).is_empty()


def test_near_duplicates_against_exact_similarity() -> None:
    """Forty words with one replaced share 35 of 41 3-grams (similarity 0.85); others share none."""
    rows = {f"p{n}": sentence(n) for n in range(30)}
    for n in range(10):
        words = rows[f"p{n}"].split()
        rows[f"q{n}"] = " ".join([*words[:20], "other", *words[21:]])
    grams = {k: texts.ngrams(texts.words("user: " + v), 3) for k, v in rows.items()}
    same = len(grams["p0"] & grams["q0"]) / len(grams["p0"] | grams["q0"])
    assert 0.8 < same < 0.9
    assert faulty(rows, near_duplicate_prompts=0.7) == {f"q{n}": "near_duplicate_prompt" for n in range(10)}
    assert faulty(rows, near_duplicate_prompts=0.99) == {}


def test_near_duplicates_do_not_depend_on_the_order() -> None:
    rows = {f"p{n}": sentence(n % 12) + (" more" if n % 2 else "") for n in range(40)}
    turned = dict(random.Random(0).sample(list(rows.items()), len(rows)))
    asked = {"near_duplicate_prompts": 0.6, "duplicate_prompts": "keep"}
    assert faulty(rows, **asked) == faulty(turned, **asked)
    assert len(faulty(rows, **asked)) >= 28


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_contamination_by_shared_ngrams(tmp_path: Path, kind: str) -> None:
    """Thirteen words in a row of a benchmark text, in another case and punctuation; twelve are not enough."""
    known = sentence(99)
    path = tmp_path / f"benchmark.{kind}"
    if kind == "txt":
        path.write_text(f"unrelated\n{known}\n")
    elif kind == "jsonl":
        path.write_text(json.dumps({"id": 3, "turns": [{"content": known}]}) + "\n\n")
    else:
        pq.write_table(pa.table({"question": ["unrelated", known], "label": [0, 1]}), path)
    words = known.split()
    rows = {
        "hit": sentence(1, 9) + ", " + ", ".join(words[5:18]).upper(),
        "miss": sentence(1, 9) + " " + " ".join(words[5:17]),
        "whole": "Unrelated!",
    }  # fmt: skip
    expected = {"hit": "contaminated", **({} if kind == "jsonl" else {"whole": "contaminated"})}
    assert faulty(rows, contamination=(str(path),)) == expected
    assert set(faulty(rows, contamination=(str(path),), contamination_ngram=12)) >= {"hit", "miss"}
    detail = prompt_filters.dropped_prompts(frame(rows), BuildPairsConfig(contamination=(str(path),))).filter(
        pl.col("prompt_id") == "hit"
    )
    assert " ".join(words[5:18]) in detail["detail"].item()


def test_benchmark_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"a": "x"}\n{broken\n')
    with pytest.raises(DataError, match=r"b\.jsonl, line 2: not valid JSON"):
        prompt_filters.benchmark_ngrams([tmp_path / "b.jsonl"], 3)
    with pytest.raises(MissingInputError):
        prompt_filters.benchmark_ngrams([tmp_path / "none.txt"], 3)
    (tmp_path / "b.csv").write_text("x")
    with pytest.raises(UsageError, match=r"unknown kind of file '\.csv'"):
        prompt_filters.benchmark_ngrams([tmp_path / "b.csv"], 3)
