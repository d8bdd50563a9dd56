"""Commit records: what they say, which files they make count, and what is made again with a damaged one."""

import json
import os
from pathlib import Path

import pytest
from blake3 import blake3

from prefpipe.runs import commits
from prefpipe.runs.tables import Encoded
from prefpipe.schemas import Reward
from tests.runs.cases import opened, rewards


def test_a_commit_record_describes_its_part(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        run.write_part("rewards/r", Reward, 7, rewards(0, 1.0, None))
        record = json.loads((tmp_path / "rewards/r/part-00007.ok.json").read_text())
        content = (tmp_path / "rewards/r/part-00007.parquet").read_bytes()
        assert record == {
            "dataset": "Reward",
            "rows": 2,
            "bytes": len(content),
            "blake3": blake3(content).hexdigest()[:32],
            "fingerprint": run.fingerprint,
            "name": "rewards/r/part-00007.parquet",
        }
        assert run.has_shard(["rewards/r"], 7)
        assert not run.has_shard(["rewards/r"], 6)


@pytest.mark.parametrize("record", ["{", "[]", "null", "{}", '{"blake3": 3}', '{"blake3": "0"}'])
def test_a_damaged_or_wrong_record_matches_nothing(tmp_path: Path, record: str) -> None:
    part = tmp_path / "part-00000.parquet"
    owner = {"fingerprint": "f", "name": part.name}
    commits.commit([commits.File(part, Reward, Encoded(b"rows", 1), owner)])
    assert commits.mismatch(part, owner) is None
    (tmp_path / "part-00000.ok.json").write_text(record)
    assert commits.mismatch(part, owner) is not None


@pytest.mark.parametrize("key", ["fingerprint", "name"])
def test_a_record_of_another_run_or_place_is_no_record_here(tmp_path: Path, key: str) -> None:
    part = tmp_path / "part-00000.parquet"
    owner = {"fingerprint": "f", "name": part.name}
    commits.commit([commits.File(part, Reward, Encoded(b"rows", 1), {**owner, key: "other"})])
    assert commits.mismatch(part, owner) == f"its commit record has another {key}"
    record = json.loads((tmp_path / "part-00000.ok.json").read_text())
    del record[key]
    (tmp_path / "part-00000.ok.json").write_text(json.dumps(record))
    assert commits.mismatch(part, owner) is None  # an older version did not write it


def test_files_that_are_committed_together_cost_a_sync_each_and_two_for_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not two for every file: with three shards of two datasets 12 and 4 in place of 24."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with opened(tmp_path) as run:
        synced.clear()
        named = [(name, index) for index in range(3) for name in ("rewards/a", "rewards/b")]
        commits.commit(run.new_part(name, Reward, index, rewards(index, 1.0)) for name, index in named)
        assert len(synced) == 12 + 4
        for name, index in named:
            assert run.has_shard([name], index)
            assert run.read_part(name, Reward, index).equals(rewards(index, 1.0))


def test_files_count_by_record_by_folder_or_by_name(tmp_path: Path) -> None:
    """Not the shard without record, not what is in quarantine, not the log of times."""
    for name in (
        "rewards/r/part-00000.parquet", "rewards/r/part-00000.ok.json", "rewards/r/part-00001.parquet",
        "quarantine/part-00003.parquet", "quarantine/part-00003.ok.json", "timing.jsonl", "checkpoints/1/state.json",
        "adapter/adapter_config.json", "model/a/b.json", "merged/c.json", "metrics.jsonl", "parity.json",
        "data_report.json",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [str(p.relative_to(tmp_path)) for p in commits.committed(tmp_path)] == [
        "adapter/adapter_config.json", "data_report.json", "merged/c.json", "metrics.jsonl", "model/a/b.json",
        "parity.json", "rewards/r/part-00000.parquet",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("damaged", "remade"),
    [
        ("pairs/part-00001.parquet", ["pairs/part-00001.parquet"]),
        ("adapter/adapter_config.json", ["adapter"]),
        ("parity.json", ["parity.json"]),
        ("metrics.jsonl", ["metrics.jsonl", "adapter", "model", "merged", "checkpoints"]),
    ],
)
def test_what_is_made_again_with_a_damaged_file(damaged: str, remade: list[str]) -> None:
    assert commits.remade_with(damaged) == remade
