"""Results of lm-evaluation-harness in the folder of a run."""

import json
from pathlib import Path
from typing import Any

import pytest

from prefpipe.errors import DataError
from prefpipe.runs import store
from prefpipe.schemas import Measure, from_table
from prefpipe.stages.evaluate import benchmarks
from tests.conftest import Write
from tests.stages.evaluate.cases import config, prompts_file, run, summary

RESULTS = {
    "colours": {"alias": "colours", "acc,none": 0.75, "acc_stderr,none": 0.1, "sample_len": 20},
    "sums": {"alias": "sums", "exact_match,strict": 0.5, "exact_match_stderr,strict": "N/A"},
}  # as lm-eval 0.4 writes them


def put(out: Path, results: dict[str, Any], time: str = "2026-01-01T00-00-00") -> None:
    folder = out / "lm-eval" / "model"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"results_{time}.json").write_text(json.dumps({"results": results, "config": {"model": "hf"}}))


def test_every_number_is_read_with_its_interval(tmp_path: Path) -> None:
    put(tmp_path, RESULTS)
    assert benchmarks.totals(tmp_path) == [
        {
            "task": "colours",
            "metric": "acc",
            "value": 0.75,
            "low": pytest.approx(0.554, abs=1e-3),
            "high": pytest.approx(0.946, abs=1e-3),
        },
        {"task": "sums", "metric": "exact_match (strict)", "value": 0.5},
    ]
    put(tmp_path, {"colours": {"acc,none": 0.8}}, "2026-01-02T00-00-00")
    assert [number["value"] for number in benchmarks.totals(tmp_path)] == [0.8, 0.5]


def test_results_join_the_table_of_a_complete_run(
    tiny_model: Path, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tiny_model, prompts_file(write, 2))
    first = run(settings, tmp_path / "e")
    put(tmp_path / "e", RESULTS)
    capsys.readouterr()
    second = run(settings, tmp_path / "e")
    assert "starting engine" not in capsys.readouterr().err
    assert second["totals"] == {**first["totals"], "benchmarks": benchmarks.totals(tmp_path / "e")}
    assert run(settings, tmp_path / "e") == second
    assert "is complete already" in capsys.readouterr().err
    assert "colours: acc 0.750 [0.554, 0.946]" in summary(tmp_path / "e")
    rows = from_table(Measure, store.read_dataset(tmp_path / "e", "measures", Measure))
    assert [(r.of, r.name, r.value, r.low is None) for r in rows[-2:]] == [
        ("task colours", "acc", 0.75, False), ("task sums", "exact_match (strict)", 0.5, True),
    ]  # fmt: skip


@pytest.mark.parametrize("content", ["[]", '{"results": 3}', '{"results": {"task": 1}}'])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "lm-eval").mkdir()
    (tmp_path / "lm-eval" / "results_x.json").write_text(content)
    with pytest.raises(DataError, match="holds no results of lm-eval"):
        benchmarks.totals(tmp_path)
