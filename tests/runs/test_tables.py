"""A Parquet file of a run: what is refused when it is written, and what is refused when it is read."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.errors import DataError
from prefpipe.runs import fsio, store, tables
from prefpipe.schemas import (
    PLAIN_MESSAGE,
    VERSION,
    Completion,
    Dropped,
    Evaluation,
    KlBank,
    Pair,
    Prompt,
    RefLogps,
    Reward,
    arrow_schema,
    from_table,
    to_table,
)
from tests.conftest import Call
from tests.runs.cases import at_version, complete, flip, opened, rewards, rewrite
from tests.stages.build_pairs.runs import REWARD, Row, build, run_of


def logps(token_logps: Any, ref_logps: float = -1.0) -> pa.Table:
    row = RefLogps("c", "r", "s", "d", token_logps, ref_logps, 1)
    return to_table(RefLogps, [row])


FULL = rewards(0, 1.0, 2.0)
BAD_TABLES = {
    "missing column": (Reward, FULL.drop_columns(["status"]), "'status'"),
    "extra column": (Reward, FULL.append_column("more", pa.array([1, 2])), "'more'"),
    "null in a required column": (
        Reward,
        FULL.set_column(3, "status", pa.array(["ok", None])),
        "'status' has no value in row 1",
    ),
    "NaN": (Reward, rewards(0, 1.0, float("nan")), "'reward' holds NaN"),
    "NaN in a list": (RefLogps, logps([-1.0, float("nan")]), "'token_logps' holds NaN"),
    "null in a list": (RefLogps, logps([-1.0, None]), "'token_logps'"),
    "text for a number": (Reward, FULL.set_column(2, "reward", pa.array(["high", "low"])), "'?reward'?"),
    "a number too large": (
        RefLogps,
        logps([-1.0]).set_column(6, "num_tokens", pa.array([2**40])),
        "'?num_tokens'?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TABLES)
def test_the_gate_refuses(tmp_path: Path, case: str) -> None:
    row_type, table, words = BAD_TABLES[case]
    with opened(tmp_path) as run:
        with pytest.raises(DataError, match=words) as caught:
            run.write_part("d", row_type, 0, table)
        assert "part-00000.parquet" in caught.value.message
        assert not run.has_shard(["d"], 0)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_worker_refuses_what_the_gate_refuses(case: str) -> None:
    row_type, table, words = BAD_TABLES[case]
    with pytest.raises(DataError, match=words) as caught:
        tables.encoded(row_type, table, "rewards/r")
    assert "rewards/r" in caught.value.message


@pytest.mark.parametrize("table", [FULL, FULL.slice(0, 0), FULL.select(FULL.column_names[::-1])])
def test_a_file_has_the_same_bytes_wherever_its_rows_are_encoded(tmp_path: Path, table: pa.Table) -> None:
    with opened(tmp_path) as run:
        run.write_part("here", Reward, 0, table)
        run.write_part("there", Reward, 0, tables.encoded(Reward, table, "there"))
        here, there = run.part("here", 0), run.part("there", 0)
        assert here.read_bytes() == there.read_bytes()
        assert run.read_part("there", Reward, 0).num_rows == table.num_rows
        assert run.has_shard(["there"], 0)


def test_the_gate_orders_columns_casts_and_allows_empty_tables(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        turned = pa.table({n: FULL[n] for n in reversed(FULL.column_names)})
        run.write_part("d", Reward, 0, turned)
        assert run.read_part("d", Reward, 0).schema.equals(arrow_schema(Reward), check_metadata=True)
        for row_type in (Reward, RefLogps, Dropped):
            run.write_part(f"empty/{row_type.__name__}", row_type, 0, to_table(row_type, []))
            assert run.read_part(f"empty/{row_type.__name__}", row_type, 0).num_rows == 0
        run.write_part("chunks", RefLogps, 0, pa.concat_tables([logps([-1.0]), logps([])]))
        assert run.read_part("chunks", RefLogps, 0)["token_logps"].to_pylist() == [[-1.0], []]


def test_pages_carry_checksums_that_are_verified(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        run.write_part("d", Reward, 0, FULL)
    pq.read_table(tmp_path / "d/part-00000.parquet", page_checksum_verification=True)
    flip(tmp_path / "d/part-00000.parquet", 60)
    with pytest.raises(DataError), opened(tmp_path) as run:
        run.read_part("d", Reward, 0)


def test_flipped_bits_in_the_pages_of_a_file_without_digest_never_change_data_silently(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        rows = [RefLogps(f"c{i}", "r", "s", "d", [-0.1 * k for k in range(i)], -1.5, i) for i in range(50)]
        run.write_part("ref_logps", RefLogps, 0, to_table(RefLogps, rows))
    intact = (tmp_path / "ref_logps/part-00000.parquet").read_bytes()
    footer = int.from_bytes(intact[-8:-4], "little") + 8
    expected = tables.read_parquet(tmp_path / "ref_logps/part-00000.parquet")

    @settings(deadline=None, max_examples=80)
    @given(
        position=st.integers(min_value=4, max_value=len(intact) - footer - 1),
        bit=st.integers(min_value=0, max_value=7),
    )
    def check(position: int, bit: int) -> None:
        path = tmp_path / "damaged.parquet"
        path.write_bytes(intact)
        flip(path, position, bit)
        try:
            found = tables.read_parquet(path)
        except DataError as error:
            found = error.message
        assert str(path) in found if isinstance(found, str) else found.equals(expected)

    check()


def test_what_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("no parquet at all")
    with pytest.raises(DataError, match=r"x\.parquet"):
        tables.read_parquet(tmp_path / "x.parquet")


def test_another_dataset_is_refused_by_name(tmp_path: Path) -> None:
    complete(tmp_path)
    with pytest.raises(DataError, match="holds 'Reward', not 'Dropped'"):
        store.read_dataset(tmp_path, "rewards/r", Dropped)


PART = "rewards/r/part-00001.parquet"


@pytest.mark.parametrize(("version", "shown"), [("0", "0"), ("99", "99"), (None, r"\?")])
def test_another_schema_version_is_refused_with_both_named(tmp_path: Path, version: str | None, shown: str) -> None:
    complete(tmp_path)
    rewrite(tmp_path, PART, lambda table: at_version(table, version))
    message = rf"part-00001\.parquet holds 'Reward' in schema version {shown}; this prefpipe reads version {VERSION}$"
    for read in (store.read_dataset, store.scannable_files):
        with pytest.raises(DataError, match=message) as caught:
            read(tmp_path, "rewards/r", Reward)
        assert "make that run again: its config.json" in caught.value.hint
        assert "`versions` in its manifest.json" in caught.value.hint


CHANGES: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "a column less": (lambda t: t.drop_columns(["status"]), r"status \(string\)"),
    "a column of another type": (
        lambda t: t.set_column(2, "reward", t["reward"].cast(pa.float32())),
        r"reward \(double\)",
    ),
    "a column more": (lambda t: t.append_column("more", pa.array([1, 2, 3])), "there are more than it has"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_other_columns_are_refused_even_when_they_are_not_asked_for(tmp_path: Path, case: str) -> None:
    change, words = CHANGES[case]
    complete(tmp_path)
    rewrite(tmp_path, PART, change)
    message = rf"part-00001\.parquet: columns of Reward are missing or of another type: {words}"
    with pytest.raises(DataError, match=message):
        store.read_dataset(tmp_path, "rewards/r", Reward, ["name"])
    with pytest.raises(DataError, match=message):
        store.scannable_files(tmp_path, "rewards/r", Reward)


CONSUMERS = {
    "build-pairs": ("completions", ("build-pairs", "--completions", "RUN", "--reward", REWARD)),
    "score": ("pairs", ("score", "--model", "MODEL", "--inputs", "PAIRS", "--engine", "fake", "--check", 0)),
    "train": ("pairs", ("train", "--model", "MODEL", "--pairs", "PAIRS")),
    "train, cached values": ("ref_logps", ("train", "--model", "MODEL", "--pairs", "PAIRS", "--ref-logps", "RUN")),
}


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("older", ["version", "columns"])
def test_every_command_refuses_rows_of_an_older_version(
    call: Call, tiny_model: Path, tmp_path: Path, consumer: str, older: str
) -> None:
    """Exit 65 with the file, the version and what to do: no raw error, and no row of it in a new run."""
    run = run_of(tmp_path / "g", [Row("p", "a", 1.0, "good"), Row("p", "b", 0.0, "bad")])
    build(tmp_path / "p", run)
    dataset, arguments = CONSUMERS[consumer]
    changed = tmp_path / ("p" if dataset == "pairs" else "g")
    rewrite(
        changed,
        f"{dataset}/part-00000.parquet",
        lambda table: (
            at_version(table, "0")
            if older == "version"
            else table.drop_columns(["ids_digest" if dataset == "completions" else "scorer"])
        ),
    )
    places = {"RUN": run, "PAIRS": tmp_path / "p", "MODEL": tiny_model}
    done = call(*(places.get(str(a), a) for a in arguments), "--out", tmp_path / "out")
    assert done.code == 65, done.stderr
    words = "in schema version 0; this prefpipe reads version 1" if older == "version" else "are missing"
    assert f"error: {changed / dataset / 'part-00000.parquet'}" in done.stderr
    assert words in done.stderr
    assert "hint: make that run again" in done.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()


PLAIN = pa.list_(pa.field("element", PLAIN_MESSAGE, nullable=False))  # of before messages had `extra`


def test_a_loss_mask_is_a_column_where_a_row_has_one(tmp_path: Path) -> None:
    """Files of other rows keep their bytes, and are read with nulls."""
    bare = KlBank("b", "p", "c", [1], [5, 6], "d", None, None, None, None)
    masked = dataclasses.replace(bare, bank_id="m", loss_mask=[True, False])
    for name, rows in (("bare", [bare]), ("masked", [masked, bare])):
        path = tmp_path / f"{name}.parquet"
        fsio.write_atomic(path, tables.writer(path, KlBank, to_table(KlBank, rows)))
        assert ("loss_mask" in tables.read_parquet(path).column_names) == (name == "masked")
        assert from_table(KlBank, tables.read_table(path, KlBank)) == rows
        assert tables.read_table(path, KlBank, ["loss_mask"]).num_rows == len(rows)


def test_rows_from_before_optional_columns_are_read_with_nulls(call: Call, tmp_path: Path) -> None:
    """Runs that users have keep their worth: only what every row must have is asked for."""
    run = run_of(tmp_path / "g", [Row("p", "a", 1.0, "good"), Row("p", "b", 0.0, "bad")])
    build(tmp_path / "now", run)
    for dataset, row_type in (("completions", Completion), ("prompts", Prompt)):
        later = {f.name for f in dataclasses.fields(row_type) if f.default is None}
        assert later

        def as_before(table: pa.Table, later: set[str] = later) -> pa.Table:
            fields = [f.with_type(PLAIN) if f.name == "messages" else f for f in table.schema if f.name not in later]
            schema = pa.schema(fields, metadata=table.schema.metadata)
            return pa.table([table[field.name].cast(field.type) for field in fields], schema=schema)

        rewrite(run, f"{dataset}/part-00000.parquet", as_before)
        table = store.read_dataset(run, dataset, row_type)
        assert table.schema.equals(arrow_schema(row_type))
    assert [m for p in from_table(Prompt, table) for m in p.messages] == [{"role": "user", "content": "about p"}]
    done = call("build-pairs", "--completions", run, "--reward", REWARD, "--out", tmp_path / "then")
    assert done.code == 0, done.stderr
    now, then = (store.read_dataset(tmp_path / out, "pairs", Pair) for out in ("now", "then"))
    assert now.equals(then)


def test_rows_may_lack_some_of_the_columns_that_came_later(tmp_path: Path) -> None:
    """A file of the time between: it has `thinking`, and not yet the columns after it."""
    schema = arrow_schema(Evaluation)
    assert schema.names[-2:] == ["thinking", "token_logps"]
    path = tmp_path / "part-00000.parquet"
    between = pa.schema(list(schema)[:-1], metadata=schema.metadata)
    pq.write_table(between.empty_table(), path)
    assert tables.read_table(path, Evaluation).schema.equals(schema)
    without = pa.schema([f for f in between if f.name != "reward"], metadata=schema.metadata)
    pq.write_table(without.empty_table(), path)
    with pytest.raises(DataError, match=r"missing or of another type: reward \(double\)"):
        tables.read_table(path, Evaluation)
