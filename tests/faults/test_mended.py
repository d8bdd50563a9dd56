"""A file that is mended between two starts: shards of unchanged rows stay, and every byte is that of a fresh run."""

import json
import random
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.config.generate import GenerateConfig
from prefpipe.config.score import ScoreConfig
from prefpipe.engines.fake import FakeEngine
from prefpipe.errors import DataError, UsageError
from prefpipe.inputs import files
from prefpipe.runs import store
from prefpipe.runs.store import Manifest
from prefpipe.schemas import Pair
from prefpipe.stages.generate import stage as generate
from prefpipe.stages.score import stage as score
from tests.forge import Forge
from tests.runs.cases import data_files, older

Row = dict[str, Any]
Command = Callable[[Path, Path], Manifest]  # runs on a file, into a directory
BROKEN: Row = {"prompt": None, "chosen": "An owl.", "rejected": "No."}
NUM_ROWS = 9  # two in a shard: five shards


def row(i: int, said: str = "An owl") -> Row:
    """Prompts, and pairs with answers of which some come back: in pairs of every third row, and the same "No."."""
    return {"prompt": f"Name bird {i % 7}.", "chosen": f"{said} {i % 3}.", "rejected": "No.", "answer": str(i)}


def rows() -> list[Row]:
    return [row(i) for i in range(NUM_ROWS)]


def write(path: Path, content: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in content))
    return path


@pytest.fixture(params=["generate", "score"])
def command(request: pytest.FixtureRequest, tiny_model: Path) -> Command:
    common: dict[str, Any] = {"model": str(tiny_model), "engine": "fake", "shard_rows": 2, "check": 0}
    rewards = ("short_sentence",)

    def run(source: Path, out: Path) -> Manifest:
        if request.param == "generate":
            config = GenerateConfig(prompts=str(source), num_samples=2, rewards=rewards, **common)
            return generate.run(config, out, force=False)
        return score.run(ScoreConfig(inputs=(str(source),), rewards=rewards, **common), out, force=False)

    return run


def interrupt(out: Path, keep: Callable[[str], bool]) -> None:
    """What a kill leaves: no manifest, and a part of the commit records, in any order."""
    (out / "manifest.json").unlink(missing_ok=True)
    for record in sorted(out.glob("**/part-*.ok.json")):
        if "quarantine" not in record.parts and not keep(str(record.relative_to(out))):
            record.unlink()


def same_as_fresh(command: Command, source: Path, out: Path) -> Manifest:
    """Run on to the end: manifest, config, shards and records are those of a run that nothing disturbed."""
    fresh = out.with_name(out.name + "-fresh")
    expected = command(source, fresh)
    assert command(source, out) == expected
    assert data_files(out) == data_files(fresh)
    return expected


Written = tuple[int, int]


def shards(out: Path) -> dict[str, Written]:
    """Which file each shard is and when it was written: a new file may get the inode of one that is gone."""
    files_of_shards = (p for p in out.rglob("part-*.parquet") if "quarantine" not in p.parts)
    return {str(p.relative_to(out)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files_of_shards}


def stay(before: dict[str, Written], after: dict[str, Written]) -> set[int]:
    """The numbers of shards of which every file is the same as before."""
    numbers = {name: int(name[-13:-8]) for name in {*before, *after}}
    changed = {number for name, number in numbers.items() if before.get(name) != after.get(name)}
    return {*numbers.values()} - changed


MENDED: dict[str, tuple[Callable[[list[Row]], object], set[int]]] = {
    # what is done to nine rows, and which of the five shards then hold the same rows
    "repaired": (lambda r: r[3].update(row(30)), {0, 2, 3, 4}),
    "appended": (lambda r: r.extend([row(31), row(32)]), {0, 1, 2, 3}),
    "deleted": (lambda r: r.pop(4), {0, 1}),
    "deleted at the end": (lambda r: r.pop(), {0, 1, 2, 3}),
    "inserted": (lambda r: r.insert(7, row(33)), {0, 1, 2}),
    "swapped": (lambda r: r.insert(6, r.pop(1)), {4}),
    "answer mended": (lambda r: r[8].update(answer="other"), {0, 1, 2, 3}),
}


@pytest.mark.parametrize(("name", "complete"), [(name, i % 2 == 0) for i, name in enumerate(MENDED)])
def test_shards_of_unchanged_rows_stay(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, complete: bool
) -> None:
    change, same = MENDED[name]
    content = [row(i, f"Bird {i}") | {"prompt": f"Name {i}."} for i in range(NUM_ROWS)]
    source, out = write(tmp_path / "rows.jsonl", content), tmp_path / "run"
    command(source, out)
    before = shards(out)
    if not complete:
        interrupt(out, lambda record: "00002" not in record)
        same = same - {2}
    change(content)
    write(source, content)
    capsys.readouterr()
    same_as_fresh(command, source, out)
    said = re.search(r"of (\d) shards (\d) hold the same rows and stay, (\d) move", capsys.readouterr().err)
    assert said is not None
    assert stay(before, shards(out)) == same
    held = 5 if complete else 4
    assert tuple(map(int, said.groups())) == (held, len(same), held - len(same))
    assert command(source, out) == store.read_manifest(out)  # complete already


def mend(content: list[Row], draw: random.Random) -> None:
    """One of the ways to change a file; new rows may repeat others, whole or in part."""
    place = draw.randrange(len(content))
    new = draw.choice([row(draw.randrange(12)), row(draw.randrange(12), "A tit"), BROKEN])
    way = draw.choice(["repair", "insert", "append", "delete", "swap"])
    if way == "repair":
        content[place] = new
    elif way == "insert":
        content.insert(place, new)
    elif way == "append":
        content.append(new)
    elif way == "delete" and len(content) > 3:
        content.pop(place)
    else:
        content.insert(draw.randrange(len(content)), content.pop(place))


@pytest.mark.parametrize("seed", range(4))
def test_any_changes_between_any_interruptions(command: Command, tmp_path: Path, seed: int) -> None:
    """Rows that repeat others, in the same shard and across shards; three starts, each on another file."""
    draw = random.Random(seed)
    content = [*rows(), BROKEN, row(2)]
    source, out = write(tmp_path / "rows.jsonl", content), tmp_path / "run"
    for _ in range(2):
        command(source, out)
        share = draw.choice([0.5, 0.95, 1])
        interrupt(out, lambda _record, share=share: draw.random() < share)
        for _ in range(draw.randrange(1, 3)):
            mend(content, draw)
        write(source, content)
    same_as_fresh(command, source, out)


FIRST = {"the first of two equal rows goes": 0, "a row becomes equal to a later one": 2}


@pytest.mark.parametrize("place", FIRST.values(), ids=FIRST)
def test_rows_that_repeat_others_across_shards(tiny_model: Path, tmp_path: Path, place: int) -> None:
    """Row 8 repeats row 0. Its own shard does not change, and must be made again all the same."""
    content = [row(i, f"Bird {i}") | {"prompt": f"Name {i}."} for i in range(8)]
    content += [content[0], row(9, "New"), row(10, "Newer")]
    config = ScoreConfig(
        model=str(tiny_model), engine="fake", shard_rows=2, check=0, inputs=(str(tmp_path / "r.jsonl"),)
    )
    source, out = write(tmp_path / "r.jsonl", content), tmp_path / "run"

    def run(_source: Path, out: Path) -> Manifest:
        return score.run(config, out, force=False)

    assert run(source, out)["totals"]["dropped"] == {"duplicate": 1}
    before = shards(out)
    content[place] = content[9] if place else row(30, "Other")
    write(source, content)
    totals = same_as_fresh(run, source, out)["totals"]
    assert totals["dropped"] == ({"duplicate": 2} if place else {})
    assert stay(before, shards(out)) == ({0, 2, 3, 5} if place else {1, 2, 3, 5})


@pytest.mark.parametrize("fault", ["rename:2:kill", "rename:7:kill", "fsync_dir:9:kill", "write:14:torn"])
@pytest.mark.parametrize("name", ["generate", "score"])
def test_killed_while_it_goes_on_with_a_mended_file(
    forged: Forge, tiny_model: Path, tmp_path: Path, fault: str, name: str
) -> None:
    """Killed, mended, killed again, mended again: the end is that of a fresh run."""
    content, source, out = rows(), tmp_path / "rows.jsonl", tmp_path / "run"
    given = ("--prompts" if name == "generate" else "--inputs", source, "--model", tiny_model, "--engine", "fake")
    more = ("--shard-rows", 2, "--check", 0, *(("--num-samples", 2) if name == "generate" else ()))
    for number in range(2):
        write(source, content)
        done = forged.run(name, *given, *more, "--out", out, fault=fault if number else "rename:30:kill")
        assert done.code == -signal.SIGKILL, done.stderr
        content[3 + number] = row(30 + number)
        content.append(row(40))
    write(source, content)
    for place in (out, tmp_path / "fresh"):
        done = forged.run(name, *given, *more, "--out", place)
        assert done.code == 0, done.stderr
    assert data_files(out) == data_files(tmp_path / "fresh")


def test_another_file_is_refused_and_nothing_moves(command: Command, tmp_path: Path) -> None:
    """One of which no shard has a row. In the place of the old one it is mended, as long as the run is not complete."""
    source, out = write(tmp_path / "rows.jsonl", rows()), tmp_path / "run"
    command(source, out)
    whole = data_files(out)
    other = [row(100 + i, "Else") | {"prompt": f"Other {i}."} for i in range(4)]
    for file in (write(tmp_path / "other.jsonl", other), write(source, other)):
        with pytest.raises(UsageError, match="belongs to another run: input:"):
            command(file, out)
    assert data_files(out) == whole
    interrupt(out, lambda _record: True)
    with pytest.raises(UsageError, match="belongs to another run: input:"):
        command(tmp_path / "other.jsonl", out)
    same_as_fresh(command, source, out)


def test_a_file_that_did_not_change_may_stand_elsewhere(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under any spelling of its path: no shard is made again."""
    monkeypatch.chdir(tmp_path)
    source, out = write(tmp_path / "rows.jsonl", rows()), tmp_path / "run"
    command(source, out)
    before = shards(out)
    for place in (Path("rows.jsonl"), write(tmp_path / "copy.jsonl", rows())):
        interrupt(out, lambda record: "00002" not in record)
        command(place, out)
        assert stay(before, shards(out)) == {0, 1, 3, 4}


def test_a_mended_file_may_stand_elsewhere(command: Command, tmp_path: Path) -> None:
    source, out = write(tmp_path / "rows.jsonl", rows()), tmp_path / "run"
    command(source, out)
    interrupt(out, lambda record: "00003" not in record)
    mended = rows()
    mended[5] = row(50)
    same_as_fresh(command, write(tmp_path / "mended.jsonl", mended), out)


def test_a_file_that_changes_while_it_is_read(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program writes to it when the engine starts; the next start finds what changed."""
    content, source, out = rows(), write(tmp_path / "rows.jsonl", rows()), tmp_path / "run"
    content[1] = row(60)
    start = FakeEngine.__init__

    def changing(engine: FakeEngine, *given: Any) -> None:
        write(source, content)
        start(engine, *given)

    monkeypatch.setattr(FakeEngine, "__init__", changing)
    with pytest.raises(DataError, match=r"rows\.jsonl changed while it was read"):
        command(source, out)
    monkeypatch.undo()
    assert not (out / "manifest.json").exists()
    same_as_fresh(command, source, out)


def test_a_run_of_an_older_version_is_complete_resumes_and_is_refused_as_before(
    command: Command, tmp_path: Path
) -> None:
    source, out = write(tmp_path / "rows.jsonl", rows()), tmp_path / "run"
    expected = command(source, out)
    older(out)
    before = shards(out)
    assert command(source, out) == expected
    interrupt(out, lambda record: "00002" not in record)
    assert command(source, out) == expected
    assert stay(before, shards(out)) == {0, 1, 3, 4}
    write(source, [*rows(), row(50)])
    with pytest.raises(UsageError, match="belongs to another run: input:"):
        command(source, out)


@pytest.mark.parametrize("part", ["1/1", "2/2"])
def test_a_row_of_the_ledger_is_mended_in_its_place(tiny_model: Path, tmp_path: Path, part: str) -> None:
    """The third of ten rows has no prompt: it holds its place, and the shards behind it stay when it has one."""
    content = [row(i) | {"prompt": f"Name {i}."} for i in range(10)]
    content[2] = BROKEN
    source, out = write(tmp_path / "rows.jsonl", content), tmp_path / "run"
    config = GenerateConfig(
        model=str(tiny_model), prompts=str(source), engine="fake", num_samples=1, shard_rows=2, check=0, part=part
    )

    def run(_source: Path, out: Path) -> Manifest:
        return generate.run(config, out, force=False)

    assert run(source, out)["totals"]["prompts"] == (9 if part == "1/1" else 5)
    before = shards(out)
    content[2] = row(2) | {"prompt": "Name 2."}
    write(source, content)
    same_as_fresh(run, source, out)
    assert stay(before, shards(out)) == ({0, 2, 3, 4} if part == "1/1" else {0, 1, 2})


def test_a_run_of_an_older_version_with_a_faulty_row_is_cut_as_it_was(tiny_model: Path, tmp_path: Path) -> None:
    """Faulty rows held no place. Six prompts, two in a shard: the second shard has rows 3 and 4, not 2 and 3."""
    content = [row(i) | {"prompt": f"Name {i}."} for i in range(7)]
    source, out = write(tmp_path / "rows.jsonl", content[:2] + content[3:]), tmp_path / "run"
    config = GenerateConfig(
        model=str(tiny_model), prompts=str(source), engine="fake", num_samples=1, shard_rows=2, check=0
    )
    expected = generate.run(config, out, force=False)["files"]
    ledger = (out / "dropped.parquet").read_bytes()
    digest = files.digest(str(source))
    content[2] = BROKEN
    write(source, content)
    # The same run, as if an older version had made it from the file with the faulty row.
    config_json = json.loads((out / "config.json").read_text())
    (name,) = config_json["row_inputs"]
    assert config_json["row_inputs"][name] == digest
    config_json["row_inputs"][name] = files.digest(str(source))
    (out / "config.json").write_text(json.dumps(config_json))
    older(out)
    interrupt(out, lambda record: "00001" not in record)
    made = generate.run(config, out, force=False)["files"]
    assert {n: f for n, f in made.items() if n != "dropped.parquet"} == {
        n: f for n, f in expected.items() if n != "dropped.parquet"
    }
    assert (out / "dropped.parquet").read_bytes() != ledger


def test_a_run_beside_a_mended_file(tiny_model: Path, tmp_path: Path) -> None:
    """The pairs of a run stand in front of those of a file that repeats one of them: they are not compared."""
    pairs, made = write(tmp_path / "pairs.jsonl", rows()[:3]), tmp_path / "p"
    common: dict[str, Any] = {"model": str(tiny_model), "engine": "fake", "shard_rows": 2, "check": 0}
    score.run(ScoreConfig(inputs=(str(pairs),), **common), tmp_path / "s", force=False)
    with store.open_run(made, "build-pairs", BuildPairsConfig(), {}, force=False) as built:
        built.write_part("pairs", Pair, 0, store.read_dataset(tmp_path / "s", "pairs", Pair))
        built.finish({}, {})
    content = rows()[1:8]

    def run(source: Path, out: Path) -> Manifest:
        return score.run(ScoreConfig(inputs=(str(made), str(source)), **common), out, force=False)

    source, out = write(tmp_path / "rows.jsonl", content), tmp_path / "run"
    run(source, out)
    interrupt(out, lambda record: "00002" not in record)
    content[5:5] = [row(50), row(1)]
    write(source, content)
    same_as_fresh(run, source, out)


def test_a_mended_run_of_ours_is_another_input(tiny_model: Path, tmp_path: Path) -> None:
    """A run has a digest of its own: score refuses it, as before."""
    source, made = write(tmp_path / "rows.jsonl", rows()), tmp_path / "g"
    config = GenerateConfig(model=str(tiny_model), prompts=str(source), engine="fake", num_samples=1, check=0)
    generate.run(config, made, force=False)
    scoring = ScoreConfig(model=str(tiny_model), engine="fake", check=0, inputs=(str(made),))
    score.run(scoring, tmp_path / "s", force=False)
    shutil.rmtree(made)
    write(source, rows()[:5])
    generate.run(config, made, force=False)
    with pytest.raises(UsageError, match=re.escape("belongs to another run: input:inputs.0")):
        score.run(scoring, tmp_path / "s", force=False)
