"""One file of rows for all processes of a node: made once, complete or not there, shared, gone at the end."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prefpipe.errors import DataError
from prefpipe.schemas import RefLogps, to_table
from prefpipe.stages.train import row_files, stage
from prefpipe.stages.train.examples import TrainPair, has_ref_logps
from prefpipe.stages.train.inputs import prepare
from prefpipe.stages.train.record_batches import Batch, encode
from prefpipe.stages.train.row_files import Facts, Writer
from prefpipe.stages.train.token_logps import TokenLogpsById
from tests.stages.train import data

PAIRS = data.to_train_pairs(data.bare_pairs(9))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prefpipe" / "rows"


def write(folder: Path) -> Facts:
    with Writer(folder / "rows.arrow") as out:
        for part in (PAIRS[:5], PAIRS[5:]):
            out.add(Batch(encode(part)))
    return {"count": out.count}


def test_the_first_process_writes_and_the_others_wait(cache: Path) -> None:
    """Four threads, each with a lock of its own as processes have; one of them writes."""
    calls: list[Path] = []

    def counted(folder: Path) -> Facts:
        calls.append(folder)
        return write(folder)

    place = row_files.place({"x": 1})
    assert place.parent == cache
    assert place != row_files.place({"x": 2})
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: row_files.opened(place, counted), range(4)))
    assert len(calls) == 1
    for files in found:
        assert files.facts == {"count": 9}
        assert files.rows["rows"] == PAIRS
    values = found[0].rows["rows"].batches[0].prompts.flat
    assert values is not None
    assert not values.flags.writeable


def test_a_writer_that_fails_leaves_nothing_and_the_next_one_writes() -> None:
    place = row_files.place({"x": 1})

    def fails(folder: Path) -> Facts:
        write(folder)
        raise DataError("a damaged file", "mend it")

    with pytest.raises(DataError):
        row_files.opened(place, fails)
    assert {path.name for path in place.iterdir()} <= {".lock", ".owner"}
    assert row_files.opened(place, write).rows["rows"] == PAIRS


def test_what_nobody_opened_for_a_day_goes_when_others_are_written(cache: Path) -> None:
    old, used = (row_files.place({"x": n}) for n in (1, 2))
    held = row_files.opened(old, write).rows["rows"]
    row_files.opened(used, write)
    past = cache.stat().st_mtime - row_files.KEPT_S - 60
    for path in (old, old / ".owner", used):  # opening the last one has renewed its file alone
        os.utime(path, (past, past))
    row_files.opened(row_files.place({"x": 3}), write)
    assert not old.exists()
    assert used.exists()
    assert held == PAIRS  # what is mapped stays


def test_without_a_cache_every_process_has_a_copy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert row_files.opened(row_files.place({"x": 1}), write).rows["rows"] == PAIRS
    assert "every rank keeps its own copy" in capsys.readouterr().err


CHILD = """
import sys
from pathlib import Path
from prefpipe.config.train import TrainConfig
from prefpipe.stages.train import mapped, mixing, process_memory, row_files
from prefpipe.stages.train.margins import Margins
from prefpipe.stages.train.record_batches import Batch
from prefpipe.stages.train.reference import audit

def private():  # pages of a file that are not on disk yet would count as dirty
    process_memory.return_free_memory()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))

kept, held = [], [private()]
for folder in sys.argv[1:]:
    rows = row_files.opened(Path(folder), None).rows["rows"]
    mapped.column(rows, Batch.suspicious)
    mapped.column(rows, Batch.num_tokens), mapped.column(rows, Batch.gaps), audit._spread(rows, 8)
    margins = Margins(rows, ())
    margins.note(1, dict.fromkeys(range(0, len(rows), 100), 0.5), held_out=False)
    kept += rows, margins, mixing.epoch_batches(mapped.all_or_none(rows), TrainConfig(model="x", pairs=("x",)), 0)
    held.append(private())
print(held[2] - held[1], "pandas" in sys.modules)
"""


@pytest.mark.slow
def test_a_rank_holds_a_few_bytes_of_a_row_of_its_own() -> None:
    """12 of margins and order, whatever the row has; that of few rows before it is what rows cost however few they are.
    None is a row that a rank has, so that pandas stays out as well: Arrow would import it for a Python value."""
    batch = Batch(encode([row for row in PAIRS for _ in range(1000)]))

    def many(folder: Path, count: int) -> Facts:
        with Writer(folder / "rows.arrow") as out:
            for _ in range(count):
                out.add(batch)
        return {}

    places = {count: row_files.place({"batches": count}) for count in (1, 20)}
    for count, place in places.items():
        row_files.opened(place, lambda folder, count=count: many(folder, count))
    command = [sys.executable, "-c", CHILD, *map(str, places.values())]
    grown, pandas = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(grown) < 24 * 20 * batch.size  # 5 measured
    assert pandas == "False"


def test_values_that_were_missing_lie_beside_the_rows() -> None:
    """Of nine pairs the first five have values; a part of the rows gets those of its own."""
    rows = [*PAIRS[:5], *(row.with_ref_logps(None) for row in PAIRS[5:])]
    made = {
        c.completion_id: tuple(-n / 8 for n, _ in enumerate(c.token_ids)) for row in rows[5:] for c in row.completions
    }
    table = to_table(
        RefLogps, [RefLogps(key, "r", "s", "d", list(v), sum(v), len(v)) for key, v in made.items()]
    )  # fmt: skip
    values = TokenLogpsById(table.select(["completion_id", "token_logps"]))
    assert dict(values) == made

    def in_two(folder: Path) -> Facts:
        with Writer(folder / "rows.arrow") as out:
            out.add(Batch(encode(rows[:6])))
            out.add(Batch(encode(rows[6:])))
        return {}

    place = row_files.place({"x": 1})
    found = row_files.opened(place, in_two).rows["rows"]
    filled = row_files.with_refs(found, values, place)
    expected = [row if has_ref_logps(row) else row.with_ref_logps(made) for row in rows]
    assert filled == expected
    assert row_files.with_refs(found[4:8], values, place) == expected[4:8]
    assert len(list((place / "refs").iterdir())) == 1
    row_files.remove(place)
    assert filled == expected


def test_pairs_of_a_run_are_the_same_by_columns_and_by_rows(tiny_model: Path, tmp_path: Path) -> None:
    """Two parts are read by columns; the same rows as examples makes them."""
    rows = data.with_reference(data.bare_pairs(7), tiny_model)
    run = data.write_pairs(tmp_path / "p", rows)
    found = prepare(data.config(tiny_model, run, run)).rows
    plain = data.to_train_pairs(rows)
    assert [row.source for row in found] == [0] * 7 + [1] * 7
    for row, own in zip(found, [*plain, *plain], strict=True):
        assert isinstance(row, TrainPair)
        assert (row.pair_id, row.prompt_ids, row.chosen, row.rejected) == (
            own.pair_id,
            own.prompt_ids,
            own.chosen,
            own.rejected,
        )
        assert row.ref_chosen == pytest.approx(own.ref_chosen, abs=1e-6)
        assert row.reward_gap == 1.0


def test_a_complete_run_leaves_no_rows_and_a_killed_one_finds_them(
    tiny_model: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = data.config(tiny_model, data.write_pairs(tmp_path / "p", data.bare_pairs(4)), num_train_epochs=1)
    monkeypatch.setattr(stage, "_train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        stage.run(config, tmp_path / "t", force=False)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (kept,) = cache.glob("*/rows/rows.arrow")
    before = kept.stat().st_ino
    prepare(config)
    assert kept.stat().st_ino == before
    stage.run(config, tmp_path / "t", force=False)
    assert list(cache.glob("*/*/*.arrow")) == []
