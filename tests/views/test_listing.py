"""Runs below a directory, and from which of them each was made."""

import json
import shutil
from pathlib import Path

import pytest

from prefpipe.errors import MissingInputError
from prefpipe.views import listing


def test_a_run_names_the_runs_that_it_was_made_from_by_digest_and_not_by_path(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "g", tmp_path / "moved/samples")
    shutil.copytree(runs / "p", tmp_path / "pairs")
    found = {Path(r["path"]).name: r for r in json.loads(listing.as_json(tmp_path))}
    assert [Path(p).name for p in found["pairs"]["made_from"]] == ["samples"]
    assert found["samples"]["made_from"] == []


def test_a_damaged_run_is_listed_among_the_others(runs: Path, tmp_path: Path) -> None:
    for name in ("g", "p"):
        shutil.copytree(runs / name, tmp_path / name)
    for name in ("config.json", "manifest.json"):
        (tmp_path / "g" / name).write_text("{")
    found = {Path(r["path"]).name: r["state"] for r in json.loads(listing.as_json(tmp_path))}
    assert found == {"g": "damaged", "p": "complete"}


def test_a_directory_without_runs_is_said(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no run below"):
        listing.runs_below(tmp_path)
