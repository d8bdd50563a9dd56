"""Folders whose names are bytes and no text: every command works in them, and its run is that of any other folder."""

import json
import os
from pathlib import Path

import pytest

from prefpipe.runs import store
from tests.forge import Forge

ALL = "PREFPIPE_ALL_FAULTS" in os.environ
MIXED = b"r\xff [1]*\n\x1b[31m'\"{}%"
PLACES = [MIXED, *([b"r\xff", "größe".encode("latin-1"), b"a b\x80\xfe", b"new\nline", b"[ab]*?"] if ALL else [])]


def run(forged: Forge, place: Path, model: Path) -> list[store.Manifest]:
    """Four commands in a folder, from a recipe, files and runs inside it; one of them is killed and run again."""
    rows = [{"prompt": f"Tell me about bird {i}."} for i in range(4)]
    (place / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "r.toml").write_text('engine = "fake"\nnum_samples = 3\nshard_rows = 2\nrewards = ["short_sentence"]\n')
    (place / "model").symlink_to(model)
    common = ["--model", model]
    commands = {
        "g": ["generate", place / "r.toml", "--prompts", place / "p.jsonl", "--check", 2, *common],
        "s": ["score", "--inputs", place / "g", "--engine", "fake", "--check", 0, *common],
        "p": ["build-pairs", "--completions", place / "g", "--ref-logps", place / "s", "--reward", "short_sentence"],
        "t": [
            "train",
            "--pairs",
            place / "p",
            "--dtype",
            "float32",
            "--train-batch-size",
            2,
            "--lora-r",
            2,
            "--loss-type",
            "cpo",
            *common,
        ],
    }
    killed = forged.run(*commands["g"], "--out", place / "g", fault="rename:9:kill")
    assert killed.code == -9
    manifests: list[store.Manifest] = []
    for name, command in commands.items():
        done = forged.run(*command, "--out", place / name)
        assert done.code == 0, done.stderr
        assert all(line.isprintable() for line in (*done.stdout.splitlines(), *done.stderr.splitlines()))
        again = forged.run(*command, "--out", place / name)
        assert "is complete already" in again.stderr
        manifests.append(store.read_manifest(place / name))
    replay = forged.run("generate", place / "g" / "config.json", "--dry-run")
    assert replay.code == 0, replay.stderr
    assert json.loads(replay.stdout)["prompts"] == str(place / "p.jsonl")
    return manifests


@pytest.fixture(scope="module")
def plain(forged: Forge, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [m["digest"] for m in run(forged, tmp_path_factory.mktemp("plain"), tiny_model)]


@pytest.mark.parametrize("name", PLACES)
def test_runs_in_a_folder_of_any_bytes(
    forged: Forge, tiny_model: Path, tmp_path: Path, plain: list[str], name: bytes
) -> None:
    place = tmp_path / os.fsdecode(name)
    try:
        place.mkdir()
    except OSError:
        pytest.skip("this file system takes no such name")
    assert [m["digest"] for m in run(forged, place, tiny_model)] == plain
