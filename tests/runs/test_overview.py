"""What people see of a run directory: complete, running, cut off or damaged, and never an error for what is missing."""

import json
import shutil
from pathlib import Path

import pytest

from prefpipe.errors import DataError, MissingInputError
from prefpipe.runs import fsio, overview
from prefpipe.runs.overview import Gap
from prefpipe.schemas import Pair, Reward
from tests.runs.cases import opened, rewards, write
from tests.stages.report import cases


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.iterate_run(tmp_path_factory.mktemp("rounds") / "run", cases.Shape(rounds=1))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with opened(tmp_path / "run") as open_run:
        write(open_run)
    return tmp_path / "run"


def test_a_complete_run(run: Path) -> None:
    seen = overview.look(run)
    assert (seen.name, seen.command, seen.state, seen.gaps) == ("run", "generate", "complete", ())
    assert seen.config["prompts"] == "prompts.jsonl"
    assert seen.totals == {"rows": 9}
    assert seen.has("rewards/r")
    assert not seen.has("rewards/x")


def test_a_run_is_running_while_a_process_holds_it(run: Path) -> None:
    (run / "manifest.json").unlink()
    seen = overview.look(run)
    assert (seen.state, seen.totals) == ("unfinished", {})
    assert overview.rows(seen, "rewards/r", Reward, 100).total == 9
    with fsio.lock(run):
        assert overview.look(run).state == "running"
    assert overview.look(run).state == "unfinished"
    (run / ".lock").unlink()
    assert overview.look(run).state == "unfinished"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError):
        overview.look(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no run of prefpipe: it has no config"):
        overview.look(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="not a directory"):
        overview.look(tmp_path / "file")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(DataError, match="not a JSON object"):
        overview.look(tmp_path)


def test_a_damaged_manifest_is_a_gap(run: Path) -> None:
    (run / "manifest.json").write_text((run / "manifest.json").read_text().replace('"rows": 9', '"rows": 8'))
    seen = overview.look(run)
    assert seen.state != "complete"
    (gap,) = seen.gaps
    assert (gap.where, "digest" in gap.why) == ("manifest.json", True)
    assert seen.has("rewards/r")


def test_rows_are_read_up_to_a_limit_without_a_damaged_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = overview.look(run)
    first = overview.rows(seen, "rewards/r", Reward, 4, ["completion_id", "reward"])
    assert [row["completion_id"] for row in first.rows] == ["c0-0", "c0-1", "c0-2", "c1-0"]
    assert (first.total, first.rows[1]) == (9, {"completion_id": "c0-1", "reward": 0.5})
    (run / "rewards/r/part-00001.parquet").write_bytes(b"PAR1 no more")
    rest = overview.rows(seen, "rewards/r", Reward, 100)
    assert [row["completion_id"][:2] for row in rest.rows] == ["c0"] * 3 + ["c2"] * 3
    assert "part-00001.parquet" in capsys.readouterr().err
    (gap,) = overview.look(run).gaps
    assert (gap.where, gap.why.startswith("12 bytes, not ")) == ("run/rewards/r/part-00001.parquet", True)
    (run / "rewards/r/part-00001.parquet").unlink()
    assert overview.look(run).gaps == (Gap(gap.where, "No such file or directory"),)
    assert overview.rows(seen, "pairs", Pair, 3).rows == []


def test_rows_of_another_kind_are_left_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert overview.rows(overview.look(run), "rewards/r", Pair, 3).rows == []
    assert "Reward" in capsys.readouterr().err


def test_only_committed_shards_of_an_unfinished_run_count(run: Path) -> None:
    (run / "manifest.json").unlink()
    (run / "rewards/r/part-00002.ok.json").unlink()
    assert overview.rows(overview.look(run), "rewards/r", Reward, 100).total == 6


def test_the_ledger_is_counted_from_the_file_where_totals_have_none(run: Path) -> None:
    assert overview.ledger(overview.look(run)) == {"too_long": 1}


def test_rows_by_their_ids(run: Path) -> None:
    columns = ["completion_id", "reward"]
    every = overview.rows(overview.look(run), "rewards/r", Reward, 100, columns).rows
    wanted = [every[1]["completion_id"], every[-1]["completion_id"], "no such id"]
    found = overview.rows(overview.look(run), "rewards/r", Reward, 100, columns, wanted)
    assert found.rows == [every[1], every[-1]]
    assert found.total == len(every)


def test_alerts_of_a_run_that_goes_on_are_those_of_its_newest_checkpoint(run: Path) -> None:
    (run / "manifest.json").unlink()
    for step, rules in ((2, ["A1"]), (4, ["A1", "A6"])):
        folder = run / f"checkpoints/step-{step:08d}"
        folder.mkdir(parents=True)
        alerts = [{"rule": rule} for rule in rules]
        (folder / "state.json").write_text(json.dumps({"diagnostics": {"alerts": alerts}}))
    assert [alert["rule"] for alert in overview.alerts(overview.look(run))] == ["A1", "A6"]
    (run / "checkpoints/step-00000004/state.json").write_text("{")
    assert [alert["rule"] for alert in overview.alerts(overview.look(run))] == ["A1"]


def test_the_steps_of_rounds(rounds: Path, tmp_path: Path) -> None:
    steps = overview.rounds(overview.look(rounds))
    assert [(step.round, step.command, step.state) for step in steps] == [
        (0, "evaluate", "complete"),
        *((1, command, "complete") for command in ("generate", "build-pairs", "train", "evaluate")),
    ]
    copy = tmp_path / "copy"
    shutil.copytree(rounds, copy)
    (copy / "manifest.json").unlink()
    shutil.rmtree(copy / "round-1/evaluate")
    (copy / "round-1/train/config.json").write_text("{")
    (copy / "round-1/train/manifest.json").write_text("{")
    cut = overview.rounds(overview.look(copy))
    assert [step.state for step in cut][-2:] == ["not started", "not started"]
    assert cut[-1].gaps == ()
    assert "config.json" in cut[-2].gaps[0].why


def test_an_absurd_number_of_rounds_is_no_endless_loop(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"command": "iterate", "config": {"rounds": 10**12}}))
    assert len(overview.rounds(overview.look(tmp_path))) == 4001


def test_the_runs_that_a_run_was_made_from(rounds: Path) -> None:
    found, gaps = overview.sources(overview.look(rounds / "round-1/train"))
    assert [run.command for run in found] == ["build-pairs", "generate"]
    assert gaps == []


def test_a_source_that_is_gone_or_made_again_is_a_gap(tmp_path: Path) -> None:
    root = cases.iterate_run(tmp_path / "run", cases.Shape(rounds=1))
    train = root / "round-1/train"
    with opened(tmp_path / "other") as other:
        other.write_part("rewards/r", Reward, 0, rewards(0, 1.0))
        other.finish({}, {})
    (root / "round-1/build-pairs").rename(tmp_path / "moved")
    found, gaps = overview.sources(overview.look(train))
    assert (found, gaps) == ([], [Gap(str(root / "round-1/build-pairs"), "it is not there any more")])
    (tmp_path / "other").rename(root / "round-1/build-pairs")
    found, gaps = overview.sources(overview.look(train))
    assert [gap.why for gap in gaps] == ["it was made again since this run read it"]
