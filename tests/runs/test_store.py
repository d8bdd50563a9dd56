"""A run directory is resumed, refused or complete; damage is found, named, and never costs intact work."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.config.base import ADDED, Config
from prefpipe.errors import DataError, LockedError, MissingInputError, UsageError
from prefpipe.runs import store
from prefpipe.schemas import Reward, from_table
from tests.conftest import ROOT
from tests.runs.cases import CONFIG, INPUTS, complete, data_files, flip, opened, rewards, write


def test_a_part_without_record_is_not_committed_and_is_written_again(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        run.write_part("rewards/r", Reward, 0, rewards(0, 1.0))
        (tmp_path / "rewards/r/part-00000.ok.json").unlink()  # killed between the two renames
        assert not run.has_shard(["rewards/r"], 0)
        run.write_part("rewards/r", Reward, 0, rewards(0, 2.0))
        assert run.read_part("rewards/r", Reward, 0)["reward"].to_pylist() == [2.0]


def test_the_manifest_lists_every_committed_file(tmp_path: Path) -> None:
    manifest = complete(tmp_path)
    assert set(manifest["files"]) == {"dropped.parquet", *(f"rewards/r/part-0000{i}.parquet" for i in range(3))}
    for name, file in manifest["files"].items():
        content = (tmp_path / name).read_bytes()
        assert file == {"bytes": len(content), "blake3": blake3(content).hexdigest()[:32]}
    assert manifest["totals"] == {"rows": 9}
    assert manifest["identity"] == {"policy": "weights:0"}
    assert manifest["inputs"] == INPUTS
    assert store.read_manifest(tmp_path) == manifest
    assert store.input_digest(tmp_path) == manifest["digest"]


def test_a_complete_run_opens_as_complete(tmp_path: Path) -> None:
    manifest = complete(tmp_path)
    before = data_files(tmp_path)
    with opened(tmp_path) as run:
        assert run.manifest() == manifest
    assert data_files(tmp_path) == before


def test_equal_runs_in_two_places_are_equal_to_the_bit(tmp_path: Path) -> None:
    assert complete(tmp_path / "a") == complete(tmp_path / "b")
    assert data_files(tmp_path / "a") == data_files(tmp_path / "b")


def test_a_partial_run_resumes_with_what_it_has(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as run:
        run.write_part("rewards/r", Reward, 1, rewards(1, 1, 0.5, None))
    record = tmp_path / "a/rewards/r/part-00001.ok.json"
    written = record.stat().st_mtime_ns
    with opened(tmp_path / "a") as run:
        assert run.manifest() is None
        assert [run.has_shard(["rewards/r"], i) for i in range(3)] == [False, True, False]
        write(run)
    assert record.stat().st_mtime_ns == written
    complete(tmp_path / "b")
    assert data_files(tmp_path / "a") == data_files(tmp_path / "b")


@pytest.mark.parametrize("name", ["rewards/r/part-00001.parquet", "dropped.parquet"])
def test_a_damaged_file_moves_to_quarantine_and_is_made_again(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    complete(tmp_path)
    before = data_files(tmp_path)
    flip(tmp_path / name)
    damaged = (tmp_path / name).read_bytes()
    with opened(tmp_path) as run:
        assert run.manifest() is None
        write(run)
    assert data_files(tmp_path) == before
    assert damaged in [p.read_bytes() for p in (tmp_path / "quarantine").iterdir()]
    assert f"{tmp_path / name} is damaged" in capfd.readouterr().err


@pytest.mark.parametrize("damage", ["{", "{}"])
def test_a_damaged_commit_record_is_no_commit_record(tmp_path: Path, damage: str) -> None:
    with opened(tmp_path) as run:
        run.write_part("rewards/r", Reward, 0, rewards(0, 1.0))
        record = tmp_path / "rewards/r/part-00000.ok.json"
        record.write_bytes(damage.encode("latin-1"))
        assert not run.has_shard(["rewards/r"], 0)
        run.write_part("rewards/r", Reward, 0, rewards(0, 1.0))
        assert run.has_shard(["rewards/r"], 0)
    assert record.name in [p.name for p in (tmp_path / "quarantine").iterdir()]


@pytest.mark.parametrize("name", ["rewards/r/part-00001.parquet", "dropped.parquet"])
def test_a_lost_file_is_made_again(tmp_path: Path, name: str) -> None:
    complete(tmp_path)
    before = data_files(tmp_path)
    (tmp_path / name).unlink()
    with opened(tmp_path) as run:
        assert run.manifest() is None
        write(run)
    assert data_files(tmp_path) == before


@pytest.mark.parametrize("damage", ["{", '{"files": {}}', "\x80"])
def test_a_damaged_manifest_of_our_own_run_is_made_again(tmp_path: Path, damage: str) -> None:
    complete(tmp_path)
    before = data_files(tmp_path)
    (tmp_path / "manifest.json").write_bytes(damage.encode("latin-1"))
    with opened(tmp_path) as run:
        assert run.manifest() is None
        write(run)
    assert data_files(tmp_path) == before


def test_what_was_damaged_twice_is_kept_twice(tmp_path: Path) -> None:
    part = tmp_path / "rewards/r/part-00000.parquet"
    for _ in range(2):
        with opened(tmp_path) as run:
            run.write_part("rewards/r", Reward, 0, rewards(0, 1.0))
            flip(part)
            assert not run.has_shard(["rewards/r"], 0)
    assert len(list((tmp_path / "quarantine").glob("part-00000.parquet*"))) == 2


def test_any_flipped_bit_is_found_by_the_consumer_and_the_file_named(tmp_path: Path) -> None:
    complete(tmp_path)
    part = tmp_path / "rewards/r/part-00002.parquet"
    intact = part.read_bytes()

    @settings(deadline=None, max_examples=60)
    @given(position=st.integers(min_value=0, max_value=len(intact) - 1), bit=st.integers(min_value=0, max_value=7))
    def check(position: int, bit: int) -> None:
        part.write_bytes(intact)
        flip(part, position, bit)
        with pytest.raises(DataError, match=r"part-00002\.parquet is damaged") as caught:
            store.read_dataset(tmp_path, "rewards/r", Reward)
        assert caught.value.exit_code == 65

    check()


def test_a_run_that_is_not_complete_is_no_input(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        run.write_part("rewards/r", Reward, 0, rewards(0, 1.0))
    with pytest.raises(MissingInputError, match=r"no complete run") as caught:
        store.input_digest(tmp_path)
    assert caught.value.exit_code == 66
    with pytest.raises(MissingInputError, match="does not exist"):
        store.input_digest(tmp_path / "absent")


def test_the_digest_of_an_input_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert store.input_digest(tmp_path / "file") == blake3(b"abc").hexdigest()[:32]


def test_parts_come_back_in_order_and_columns_as_asked(tmp_path: Path) -> None:
    complete(tmp_path)
    table = store.read_dataset(tmp_path, "rewards/r", Reward)
    assert [r.completion_id for r in from_table(Reward, table)] == [f"c{k}-{i}" for k in range(3) for i in range(3)]
    assert store.read_dataset(tmp_path, "rewards/r", Reward, ["name"]).column_names == ["name"]


def test_a_missing_dataset_error_lists_what_is_there(tmp_path: Path) -> None:
    complete(tmp_path)
    with pytest.raises(MissingInputError, match="no dataset 'pairs'") as caught:
        store.read_dataset(tmp_path, "pairs", Reward)
    assert "rewards/r" in caught.value.hint
    assert "it is a run of generate" in caught.value.message
    assert "give a run of `prefpipe build-pairs`" in caught.value.hint


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    complete(tmp_path)
    before = data_files(tmp_path)
    other = CONFIG.model_copy(update={"num_samples": 4, "temperature": 0.5})
    with pytest.raises(UsageError, match=r"num_samples: 8 there, 4 now; temperature: 1\.0 there, 0\.5 now") as caught:
        complete(tmp_path, config=other)
    assert caught.value.exit_code == 2
    assert "--force" in caught.value.hint
    assert "seed" not in caught.value.message
    assert data_files(tmp_path) == before


def test_other_inputs_and_another_command_are_refused_and_named(tmp_path: Path) -> None:
    complete(tmp_path)
    with pytest.raises(UsageError, match="input:prompts: 'digest-of-prompts' there, 'other' now"):
        complete(tmp_path, inputs={"prompts": "other"})
    other = store.open_run(tmp_path, "train", CONFIG, INPUTS, force=False)
    with pytest.raises(UsageError, match=r"another run: command: 'generate' there, 'train' now$"), other:
        pass


def test_runtime_settings_and_paths_do_not_matter_and_resume_follows_the_first_start(tmp_path: Path) -> None:
    manifest = complete(tmp_path)
    update = {"max_num_seqs": 3, "kv_cache_mib": 16, "shard_rows": 5, "prompts": "elsewhere.jsonl", "model": "m"}
    with opened(tmp_path, CONFIG.model_copy(update=update)) as run:
        assert run.manifest() == manifest
        assert run.saved["shard_rows"] == CONFIG.shard_rows


class Older(Config):
    power: float = 2.0


class Younger(Config):
    power: float = 2.0
    cut: Annotated[float, ADDED] = 1.0


def test_a_run_from_before_a_setting_was_added_is_complete_and_resumes(tmp_path: Path) -> None:
    """Its config.json and its fingerprint lack the setting, which stands for the default."""
    manifest = complete(tmp_path / "done", config=Older())
    with opened(tmp_path / "done", config=Younger()) as run:
        assert run.manifest() == manifest
    with opened(tmp_path / "cut", config=Older()) as run:
        run.write_part("rewards/r", Reward, 0, rewards(0, 0, 0.5, None))
    with opened(tmp_path / "cut", config=Younger()) as run:
        assert run.has_shard(["rewards/r"], 0)
        assert write(run) == manifest
    with pytest.raises(UsageError, match="cut"), opened(tmp_path / "done", config=Younger(cut=3.0)):
        pass


def test_force_moves_everything_to_quarantine_and_starts_over(tmp_path: Path) -> None:
    complete(tmp_path)
    old = data_files(tmp_path)
    other = CONFIG.model_copy(update={"num_samples": 4})
    with opened(tmp_path, other, force=True) as run:
        assert run.manifest() is None
        assert not run.has_shard(["rewards/r"], 0)
        write(run)
    moved = {str(p.relative_to(tmp_path / "quarantine")): p.read_bytes()
             for p in (tmp_path / "quarantine").rglob("*") if p.is_file()}  # fmt: skip
    assert moved == old
    assert store.read_manifest(tmp_path)["fingerprint"] != json.loads(old["manifest.json"])["fingerprint"]


def test_force_on_the_same_settings_starts_over_too(tmp_path: Path) -> None:
    complete(tmp_path)
    with opened(tmp_path, force=True) as run:
        assert run.manifest() is None


FORCE = """
import os, signal, sys
from pathlib import Path
from prefpipe.runs import store
from prefpipe.config.base import ADDED, Config
from prefpipe.config.generate import GenerateConfig
moves, rename = [], os.rename
def dying_rename(*given):
    moves.append(given)
    if len(moves) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*given)
os.rename = dying_rename
config = GenerateConfig(prompts="prompts.jsonl")
with store.open_run(Path(sys.argv[1]), "generate", config, {"prompts": "digest-of-prompts"}, force=True):
    pass
"""


def test_a_kill_while_force_moves_files_can_be_repeated(tmp_path: Path) -> None:
    complete(tmp_path / "fresh")
    for number in (1, 2, 3, 4, 5):  # config, dropped, its record, rewards, manifest, in the order of the directory
        out = tmp_path / str(number)
        complete(out)
        killed = subprocess.run([sys.executable, "-c", FORCE, str(out), str(number)], cwd=ROOT, check=False)
        assert killed.returncode == -signal.SIGKILL
        complete(out, force=True)
        assert data_files(out) == data_files(tmp_path / "fresh")


@pytest.mark.parametrize("force", [False, True])
def test_a_directory_of_someone_else_is_refused_and_left_alone(tmp_path: Path, force: bool) -> None:
    (tmp_path / "thesis").mkdir()
    for name in ("thesis/chapter.txt", ".notes.tmp", "thesis/.draft.tmp"):
        (tmp_path / name).write_text("years of work")
    with pytest.raises(UsageError, match="is not empty and is not a run of prefpipe"):
        complete(tmp_path, force=force)
    assert (tmp_path / "thesis/chapter.txt").exists()
    assert (tmp_path / ".notes.tmp").exists()
    assert (tmp_path / "thesis/.draft.tmp").exists()


@pytest.mark.parametrize("force", [False, True])
def test_a_directory_with_someone_elses_config_json_is_refused(tmp_path: Path, force: bool) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_text("weights")
    with pytest.raises(UsageError, match=str(tmp_path)):
        complete(tmp_path, force=force)
    assert (tmp_path / "model.safetensors").exists()


def test_a_damaged_config_json_is_named(tmp_path: Path) -> None:
    complete(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json is damaged"):
        complete(tmp_path)


def test_the_saved_config_is_the_first_file(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as run:
        saved = json.loads((tmp_path / "a" / "config.json").read_text())
        assert saved["command"] == "generate"
        assert saved["config"] == CONFIG.model_dump(mode="json") == run.saved
        assert not (tmp_path / "a" / "manifest.json").exists()


def test_two_writers_of_one_directory(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(LockedError, match=f"process {os.getpid()}"):
        complete(tmp_path)


def test_temporary_files_of_a_killed_writer_are_removed_on_resume(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        run.write_part("rewards/r", Reward, 0, rewards(0, 1.0))
    left = tmp_path / "rewards/r/.part-00001.parquet.123.tmp"
    left.write_text("half")
    complete(tmp_path)
    assert not left.exists()
    assert str(left.relative_to(tmp_path)) not in store.read_manifest(tmp_path)["files"]


def test_every_dataset_name_that_can_be_written_can_be_read(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        run.write_part("rewards/mein_modul:größe", Reward, 0, rewards(0, 1.0))  # a user's own Python names
        run.finish({}, {})
    assert store.read_dataset(tmp_path, "rewards/mein_modul:größe", Reward).num_rows == 1


def test_timing_stays_outside_of_every_digest(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as run:
        run.log_timing(event="sampled", seconds=1.5)
        timed = write(run)
    (line,) = (tmp_path / "a/timing.jsonl").read_text().splitlines()
    noted = json.loads(line)
    assert (noted.pop("at")[:2], noted.pop("peak_memory_gib") > 0) == ("20", True)
    noted.pop("peak_gpu_memory_gib", None)  # where an earlier test has used a GPU
    assert noted == {"event": "sampled", "seconds": 1.5}
    assert timed == complete(tmp_path / "b")


def test_published_directories_and_metrics_are_in_the_manifest(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
        (tmp_path / "metrics.jsonl").write_text("{}\n")
        manifest = run.finish({}, {})
    assert set(manifest["files"]) == {"adapter/adapter_model.safetensors", "metrics.jsonl"}


def test_the_digest_changes_with_data_and_settings_only(tmp_path: Path) -> None:
    base = complete(tmp_path / "base")["digest"]
    with opened(tmp_path / "data") as run:
        run.write_part("rewards/r", Reward, 0, rewards(0, 1.0))
        assert write(run)["digest"] != base
    assert complete(tmp_path / "seed", config=CONFIG.model_copy(update={"seed": 1}))["digest"] != base
    assert complete(tmp_path / "paths", config=CONFIG.model_copy(update={"prompts": "p"}))["digest"] == base


@settings(deadline=None, max_examples=25)
@given(values=st.lists(st.none() | st.floats(allow_nan=False), max_size=8))
def test_values_survive_a_shard(values: list[float | None]) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        with opened(folder) as run:
            run.write_part("d", Reward, 0, rewards(0, *values))
            assert run.read_part("d", Reward, 0)["reward"].to_pylist() == values
    finally:
        shutil.rmtree(folder)
