"""A manifest that was edited, damaged, or that names files outside its directory is no manifest."""

import json
from pathlib import Path

import pytest

from prefpipe import __version__
from prefpipe.errors import DataError
from prefpipe.ids import content_id
from prefpipe.runs import manifests, store
from prefpipe.schemas import Reward
from tests.runs.cases import complete, reseal

CONTENT = {
    "fingerprint": "f", "totals": {"rows": 1}, "identity": {"policy": "w"}, "files": {"a": {"bytes": 3, "blake3": "0"}}
}  # fmt: skip


def test_the_digest_is_of_settings_results_and_files(tmp_path: Path) -> None:
    written = manifests.write(tmp_path / "manifest.json", CONTENT)
    assert written["digest"] == content_id("f", {"rows": 1}, {"policy": "w"}, {"a": "0"})
    assert written["versions"]["prefpipe"] == __version__
    assert manifests.digest({**written, "versions": {}}) == written["digest"]
    assert manifests.read(tmp_path / "manifest.json") == written


@pytest.mark.parametrize("name", ["../x.parquet", "rewards/../../x", "/etc/hostname", "..", "a/..", "a\n", "", "a//b"])
def test_a_manifest_that_names_files_outside_is_refused(tmp_path: Path, name: str) -> None:
    complete(tmp_path / "out")
    reseal(tmp_path / "out", files={name: {"bytes": 1, "blake3": "0"}})
    with pytest.raises(DataError, match="names files outside"):
        store.read_manifest(tmp_path / "out")


@pytest.mark.parametrize("entry", [{"bytes": 1}, None])
def test_a_manifest_with_entries_without_digest_is_refused(tmp_path: Path, entry: object) -> None:
    manifests.write(tmp_path / "manifest.json", CONTENT)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "files": {"a": entry}}))
    with pytest.raises(DataError, match="does not match its own digest"):
        manifests.read(tmp_path / "manifest.json")


def test_an_edited_manifest_does_not_match_its_digest(tmp_path: Path) -> None:
    complete(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["rewards/r/part-00001.parquet"]  # a shard less: a silently smaller dataset
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="does not match its own digest"):
        store.read_dataset(tmp_path, "rewards/r", Reward)


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_what_is_no_json_object_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(DataError, match=r"config\.json is damaged"):
        manifests.read_json(tmp_path / "config.json")


def manifest_of(command: str, *files: str) -> dict[str, object]:
    return {"command": command, "files": dict.fromkeys(files)}


@pytest.mark.parametrize(
    ("dataset", "maker"),
    [
        ("pairs", "give a run of `prefpipe build-pairs`; "),
        ("labels", "give a run of `prefpipe build-pairs --output labels`; "),
        ("completions", "give a run of `prefpipe generate`, or of `prefpipe score` for a file; "),
        ("rewards/math", "give a run of `prefpipe generate` or `prefpipe score` with --rewards; "),
        ("margins", ""),
    ],
)
def test_a_run_that_lacks_a_dataset_is_told_which_run_has_it(dataset: str, maker: str) -> None:
    error = manifests.lacking(Path("runs/g"), manifest_of("generate", "a/1.parquet", "rewards/b/1.parquet"), dataset)
    assert error.message == f"runs/g has no dataset '{dataset}': it is a run of generate"
    assert error.hint == f"{maker}this one has: a, rewards/b"


def test_a_run_of_another_command_is_told_what_is_needed() -> None:
    assert manifests.other_kind(Path("t"), "train", "build-pairs", "--pairs").message == (
        "t is a run of train; --pairs needs a run of build-pairs"
    )
    assert manifests.other_kind(Path("t"), "train", "iterate").message.endswith("; this command needs a run of iterate")
