"""A run whose input has other rows than when it started: which of them goes on, and what is said."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from prefpipe.errors import UsageError
from prefpipe.runs import store
from prefpipe.runs.resume import ROWS, RowInputs
from prefpipe.runs.store import Manifest
from prefpipe.schemas import Reward
from tests.runs.cases import CONFIG, data_files, older, rewards

Rows = Sequence[str]  # the digest of the rows of every shard


def run(out: Path, rows: Rows, *, path: str = "prompts.jsonl", seed: int = 0, shards: int | None = None) -> Manifest:
    """Commit the shards that are missing, at most so many; the run is complete when all are there."""
    config = CONFIG.model_copy(update={"prompts": path, "seed": seed})
    by_row = RowInputs(["prompts"], lambda saved: rows if saved["num_samples"] == CONFIG.num_samples else [])
    with store.open_run(out, "generate", config, {"prompts": "-".join(rows)}, force=False, by_row=by_row) as opened:
        manifest = opened.manifest()
        for index, digest in enumerate(rows[:shards]):
            if not opened.has_shard(["rewards/r"], index, {ROWS: digest}):
                opened.write_part("rewards/r", Reward, index, rewards(index, len(digest)), {ROWS: digest})
        opened.set_others_aside([("rewards/r", index) for index in range(len(rows))])
        return manifest or (opened.finish({}, {}) if shards is None else {})


@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        ("abc", "abc", None),
        ("abc", "abcd", (3, 3, 0)),
        ("abc", "axc", (3, 2, 1)),
        ("abc", "ab", (3, 2, 1)),
        ("abc", "bac", (3, 1, 2)),
    ],
)
@pytest.mark.parametrize("shards", [None, 3])
def test_a_mended_input_gives_the_run_of_a_fresh_start(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    first: str,
    then: str,
    said: tuple[int, int, int] | None,
    shards: int | None,
) -> None:
    run(tmp_path / "run", first, shards=shards)
    capsys.readouterr()
    assert run(tmp_path / "run", then) == run(tmp_path / "fresh", then)
    assert data_files(tmp_path / "run") == data_files(tmp_path / "fresh")
    found = re.search(r"of (\d) shards (\d) hold the same rows and stay, (\d) move", capsys.readouterr().err)
    assert (found and tuple(map(int, found.groups()))) == said


@pytest.mark.parametrize(("shards", "path", "goes_on"), [
    (None, "prompts.jsonl", False), (2, "other.jsonl", False), (2, "prompts.jsonl", True), (0, "other.jsonl", True),
])  # fmt: skip
def test_rows_of_which_no_shard_has_one_are_another_input(
    tmp_path: Path, shards: int | None, path: str, goes_on: bool
) -> None:
    """They may be in the place of the old ones, as long as the run is not complete, or there is no shard at all."""
    run(tmp_path / "run", "abc", shards=shards)
    before = data_files(tmp_path / "run")
    if goes_on:
        assert run(tmp_path / "run", "xyz", path=path) == run(tmp_path / "fresh", "xyz")
        return
    with pytest.raises(UsageError, match="belongs to another run: input:prompts: 'a-b-c' there, 'x-y-z' now"):
        run(tmp_path / "run", "xyz", path=path)
    assert data_files(tmp_path / "run") == before


def test_other_settings_are_another_run_whatever_the_rows_are(tmp_path: Path) -> None:
    run(tmp_path, "abc", shards=2)
    for rows in ("abc", "abx"):
        with pytest.raises(UsageError, match=r"belongs to another run: .*seed: 0 there, 1 now"):
            run(tmp_path, rows, seed=1)


def test_a_run_of_an_older_version_knows_its_input_as_a_whole(tmp_path: Path) -> None:
    manifest = run(tmp_path / "done", "abc")
    run(tmp_path / "cut", "abc", shards=2)
    for out in (tmp_path / "done", tmp_path / "cut"):
        older(out)
        assert run(out, "abc") == manifest
        with pytest.raises(UsageError, match="belongs to another run: input:prompts"):
            run(out, "abx")


def test_config_json_has_the_new_place_and_the_settings_of_the_first_start(tmp_path: Path) -> None:
    run(tmp_path, "abc", shards=2)
    run(tmp_path, "abx", path="mended.jsonl", shards=2)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["config"]["prompts"], saved["row_inputs"]) == ("mended.jsonl", {"input:prompts": "a-b-x"})
    assert "input:prompts" not in saved["identity"]
