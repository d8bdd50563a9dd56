"""An interrupted run whose files were changed before it goes on: the right result, or an error, and nothing else."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefpipe.config.generate import GenerateConfig
from prefpipe.errors import DataError, UsageError
from prefpipe.runs import store
from prefpipe.schemas import Completion
from prefpipe.stages.generate import stage
from tests.conftest import ROOT
from tests.forge import Forge
from tests.runs.cases import older

NUM_PROMPTS, NUM_SAMPLES = 6, 3


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> GenerateConfig:
    return GenerateConfig(
        model=str(tiny_model), prompts=str(ROOT / "data" / "prompts.jsonl"), engine="fake", num_samples=NUM_SAMPLES,
        rewards=("short_sentence",), shard_rows=2, limit=NUM_PROMPTS,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cut(forged: Forge, config: GenerateConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three shards that was killed in its third; beside it the whole one, and one with another seed."""
    folder = tmp_path_factory.mktemp("resume")
    for name, update in (("cut", {}), ("whole", {}), ("other", {"seed": 7})):
        (folder / f"{name}.json").write_text(config.model_copy(update=update).model_dump_json())
        job = {"fault": "rename:24:kill"} if name == "cut" else {}
        done = forged.run("generate", folder / f"{name}.json", "--out", folder / name, **job)
        assert done.code == (-9 if job else 0), done.stderr
    assert len(list((folder / "cut" / "completions").glob("*.ok.json"))) == 2
    return folder


def edit(out: Path, change: Callable[[dict[str, Any]], object], *, sealed: bool = True) -> None:
    path = out / "config.json"
    saved = json.loads(path.read_text())
    change(saved)
    if not sealed:
        del saved["record_id"]
    path.write_text(json.dumps(saved))


def linked(out: Path, _cut: Path) -> None:
    for name in ("completions", "prompts", "rewards"):
        (out / name).rename(out.parent / name)
        (out / name).symlink_to(out.parent / name)


def of_another_seed(out: Path, cut: Path) -> None:
    for name in ("completions", "rewards/short_sentence", "ref_logps"):
        shutil.copytree(cut / "other" / name, out / name, dirs_exist_ok=True)


def a_shard_twice(out: Path, _cut: Path) -> None:
    for path in sorted(out.rglob("part-00000*")):
        shutil.copy(path, path.with_name(path.name.replace("00000", "00002")))


def a_record_edited(out: Path, _cut: Path) -> None:
    path = out / "completions/part-00000.ok.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprint": "0" * 32}))


def pipes_for_shards(out: Path, _cut: Path) -> None:
    for path in [*out.glob("completions/*.parquet"), *out.glob("prompts/*.ok.json")]:
        path.unlink()
        os.mkfifo(path)


def no_text_for_records(out: Path, _cut: Path) -> None:
    for path, text in zip(
        out.rglob("*.ok.json"), ["[" * 99999, "\0", "{}", "9" * 9999, "\xff", "null"] * 3, strict=False
    ):
        path.write_bytes(text.encode("latin-1"))


def an_owner_that_is_no_text(out: Path, _cut: Path) -> None:
    (out / ".owner").write_bytes(b"\xff\xfe\0")


def an_inflight_log_that_is_no_text(out: Path, _cut: Path) -> None:
    (out / "inflight.log").write_bytes(b"take \xff\xfe\nkiller \x80\n\0")


@pytest.mark.parametrize(
    "damage",
    [
        linked, of_another_seed, a_shard_twice, a_record_edited, pipes_for_shards, no_text_for_records,
        an_owner_that_is_no_text, an_inflight_log_that_is_no_text,
    ],
)  # fmt: skip
def test_what_was_changed_is_found_and_made_again(
    cut: Path, config: GenerateConfig, tmp_path: Path, damage: Callable[[Path, Path], None]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(cut / "cut", out)
    damage(out, cut)
    assert stage.run(config, out, force=False) == store.read_manifest(cut / "whole")
    assert store.read_dataset(out, "completions", Completion).num_rows == NUM_PROMPTS * NUM_SAMPLES


@pytest.mark.parametrize("rows", [1, 3, 4, 6])
@pytest.mark.parametrize("sealed", [True, False])
def test_shards_of_another_size_never_give_a_run(
    cut: Path, config: GenerateConfig, tmp_path: Path, rows: int, sealed: bool
) -> None:
    """In a run of an older version nothing tells that the size was edited; but its rows do not add up."""
    out = tmp_path / "run"
    shutil.copytree(cut / "cut", out)
    if not sealed:
        older(out)
    edit(out, lambda saved: saved["config"].update(shard_rows=rows), sealed=sealed)
    with pytest.raises(DataError, match="edited after the run" if sealed else "came in, but") as caught:
        stage.run(config, out, force=False)
    assert "--force" in caught.value.hint
    assert not (out / "manifest.json").exists()
    assert stage.run(config, out, force=True) == store.read_manifest(cut / "whole")


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "completions/part-00000.parquet"])
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to(path.name)])
def test_no_file_in_the_place_of_one_never_waits(
    cut: Path, config: GenerateConfig, tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    """The result of the whole run, or one error that names the file."""
    out = tmp_path / "run"
    shutil.copytree(cut / "whole", out)
    (out / name).unlink()
    make(out / name)
    if name == "config.json":
        with pytest.raises((DataError, UsageError), match=str(out)):
            stage.run(config, out, force=False)
    else:
        assert stage.run(config, out, force=False) == store.read_manifest(cut / "whole")
