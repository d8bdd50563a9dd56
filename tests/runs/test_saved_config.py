"""config.json is what the run was started with, or it is refused: a resumed run follows it."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from prefpipe.errors import DataError, UsageError
from prefpipe.runs import commits, manifests, store
from prefpipe.schemas import Reward
from tests.runs.cases import CONFIG, complete, data_files, flip, opened, rewards, write

Saved = dict[str, Any]


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """A run that was killed after its first shard."""
    with opened(tmp_path / "run") as run:
        run.write_part("rewards/r", Reward, 0, rewards(0, 0, 0.5, None))
    return tmp_path / "run"


def edit(out: Path, change: Callable[[Saved], object], *, older: bool = False) -> None:
    path = out / "config.json"
    saved = json.loads(path.read_text())
    change(saved)
    if older:
        saved.pop("record_id")
    path.write_text(json.dumps(saved, indent=2))


EDITS: dict[str, Callable[[Saved], object]] = {
    "shard_rows": lambda saved: saved["config"].update(shard_rows=3),
    "a setting less": lambda saved: saved["config"].pop("shard_rows"),
    "a setting more": lambda saved: saved["config"].update(colour="red"),
    "the command": lambda saved: saved.update(command="train"),
    "the identity": lambda saved: saved["identity"].update(seed=9),
    "another seal": lambda saved: saved.update(record_id="0" * 32),
    "no settings": lambda saved: saved.update(config=None),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_refused_and_force_starts_over(cut: Path, tmp_path: Path, name: str) -> None:
    edit(cut, EDITS[name])
    with pytest.raises(DataError, match=r"config\.json is damaged, or was edited") as caught:
        complete(cut)
    assert "--force" in caught.value.hint
    complete(cut, force=True)
    complete(tmp_path / "fresh")
    assert data_files(cut) == data_files(tmp_path / "fresh")


def test_an_edit_of_spaces_changes_nothing(cut: Path) -> None:
    edit(cut, lambda _saved: None)
    complete(cut)


def test_no_bit_can_be_flipped_without_a_word(cut: Path) -> None:
    """The same settings are read, or the run is refused."""
    path = cut / "config.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole)
        flip(path, position, position % 8)
        with suppress(DataError, UsageError), opened(cut) as run:
            assert run.saved == CONFIG.model_dump(mode="json"), whole[position - 9 : position + 9]


@pytest.mark.parametrize("value", [0.5, -1, "many", [2], None])
def test_without_a_seal_the_settings_are_checked_by_their_class(cut: Path, value: object) -> None:
    edit(cut, lambda saved: saved["config"].update(shard_rows=value), older=True)
    with pytest.raises(DataError, match=r"config\.json is damaged: .*shard_rows"):
        complete(cut)


def test_a_run_of_an_older_version_is_complete_and_resumes(cut: Path, tmp_path: Path) -> None:
    """No seal, no names in commit records, and a setting that is no setting any more."""
    manifest = complete(tmp_path / "done")
    for out in (cut, tmp_path / "done"):
        edit(out, lambda saved: saved["config"].update(colour="red"), older=True)
        for record in out.rglob("*.ok.json"):
            kept = {key: value for key, value in json.loads(record.read_text()).items() if key != "name"}
            record.write_text(json.dumps(kept))
    with opened(tmp_path / "done") as run:
        assert run.manifest() == manifest
    with opened(cut) as run:
        assert run.has_shard(["rewards/r"], 0)
        assert write(run) == manifest


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("{")])
def test_force_works_where_config_json_is_damaged_or_lost(cut: Path, damage: Callable[[Path], object]) -> None:
    damage(cut / "config.json")
    with pytest.raises((DataError, UsageError)):
        complete(cut)
    complete(cut, force=True)


def test_shards_of_another_run_are_set_aside(cut: Path, tmp_path: Path) -> None:
    """One with a number of this run, and one with a number that nobody asks for."""
    other = CONFIG.model_copy(update={"seed": 7})
    with opened(tmp_path / "other", other) as run:
        for index in (1, 8):
            run.write_part("rewards/r", Reward, index, rewards(index, 9.0))
    for file in (tmp_path / "other" / "rewards/r").iterdir():
        file.rename(cut / "rewards/r" / file.name)
    assert complete(cut)["files"] == complete(tmp_path / "fresh")["files"]
    assert len(list((cut / "quarantine").iterdir())) == 4


def test_a_shard_under_another_number_is_set_aside(cut: Path, tmp_path: Path) -> None:
    for suffix in ("parquet", "ok.json"):
        (cut / f"rewards/r/part-00002.{suffix}").write_bytes((cut / f"rewards/r/part-00000.{suffix}").read_bytes())
    assert complete(cut)["files"] == complete(tmp_path / "fresh")["files"]


def test_a_shard_that_changes_while_the_run_works_is_not_in_the_manifest(cut: Path) -> None:
    with opened(cut) as run:
        assert run.has_shard(["rewards/r"], 0)
        flip(cut / "rewards/r/part-00000.parquet", 9)
        with pytest.raises(DataError, match=r"part-00000\.parquet: it does not match its commit record"):
            run.finish({}, {})
    complete(cut)


def test_the_manifest_of_another_run_is_set_aside(tmp_path: Path) -> None:
    complete(tmp_path / "other", config=CONFIG.model_copy(update={"seed": 7}))
    manifest = complete(tmp_path / "run")
    (tmp_path / "other" / "manifest.json").rename(tmp_path / "run" / "manifest.json")
    with opened(tmp_path / "run") as run:
        assert run.manifest() is None
        assert write(run) == manifest


def test_a_dataset_behind_a_link_is_in_the_manifest(tmp_path: Path) -> None:
    """Folders of a large dataset may live on another disk; a link that leads round in a circle is followed once."""
    with opened(tmp_path / "run") as run:
        run.write_part("rewards/r", Reward, 0, rewards(0, 0, 0.5, None))
    (tmp_path / "run" / "rewards" / "r").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "rewards" / "r").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "run")
    assert complete(tmp_path / "run")["files"] == complete(tmp_path / "fresh")["files"]
    assert store.read_dataset(tmp_path / "run", "rewards/r", Reward).num_rows == 9


@pytest.mark.parametrize(("kept", "dropped"), [(12, 0), (18, 1), (17, 0), (24, 0)])
def test_rows_that_do_not_add_up_are_no_run(tmp_path: Path, kept: int, dropped: int) -> None:
    with opened(tmp_path) as run:
        with pytest.raises(DataError, match=f"18 rows came in, but {kept} are kept and {dropped} dropped"):
            run.finish({}, {}, [manifests.Balance("rows", 18, kept, dropped)])
        assert not (tmp_path / "manifest.json").exists()
        run.finish({}, {}, [manifests.Balance("rows", 18, 17, 1)])


def test_files_of_a_run_inside_a_run_are_its_files(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        inner = complete(tmp_path / "round-1/generate")
        assert len(run.finish({}, {})["files"]) == len(inner["files"])
    assert [path for path in commits.recorded(tmp_path) if "round-1" in str(path)] == []
