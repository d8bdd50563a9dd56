"""A small run to write, to damage and to read again, for the tests of several modules."""

import json
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from prefpipe.config.generate import GenerateConfig
from prefpipe.ids import content_id
from prefpipe.runs import commits, manifests, store
from prefpipe.runs.store import Manifest, Run
from prefpipe.schemas import Dropped, Reward, to_table

CONFIG = GenerateConfig(prompts="prompts.jsonl")
INPUTS = {"prompts": "digest-of-prompts"}


@contextmanager
def opened(
    out: Path, config: BaseModel = CONFIG, inputs: Mapping[str, str] = INPUTS, *, force: bool = False
) -> Generator[Run]:
    with store.open_run(out, "generate", config, inputs, force=force) as run:
        yield run


def rewards(index: int, *values: float | None) -> pa.Table:
    return to_table(Reward, [Reward(f"c{index}-{i}", "r", v, "ok", None) for i, v in enumerate(values)])


def write(run: Run) -> Manifest:
    """What a stage does: the missing shards, then the manifest."""
    run.write_dropped(Dropped, to_table(Dropped, [Dropped("p9", "too_long", "9 tokens")]))
    for index in range(3):
        if not run.has_shard(["rewards/r"], index):
            run.write_part("rewards/r", Reward, index, rewards(index, index, 0.5, None))
    return run.finish({"rows": 9}, {"policy": "weights:0"})


def complete(out: Path, **given: Any) -> Manifest:
    with opened(out, **given) as run:
        return write(run)


def data_files(out: Path) -> dict[str, bytes]:
    skipped = (".lock", ".owner", "timing.jsonl", "quarantine")
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in sorted(out.rglob("*"))
        if p.is_file() and p.relative_to(out).parts[0] not in skipped
    }


def older(out: Path) -> None:
    """A run as versions wrote it that recorded no rows: config.json and commit records know the input by its digest."""
    path = out / "config.json"
    saved = json.loads(path.read_text())
    saved["identity"] |= saved.pop("row_inputs")
    del saved["record_id"]
    path.write_text(json.dumps(saved | {"record_id": content_id(saved)}))
    for record in out.rglob("*.ok.json"):
        kept = {k: v for k, v in json.loads(record.read_text()).items() if not k.startswith("input_")}
        record.write_text(json.dumps(kept | {"fingerprint": content_id(saved["identity"])}))


def flip(path: Path, position: int = -1, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << bit
    path.write_bytes(content)


def reseal(out: Path, **changes: Any) -> None:
    """Edit the manifest of a complete run, and make its digest right again."""
    manifest = {**json.loads((out / "manifest.json").read_text()), **changes}
    manifest["digest"] = manifests.digest(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))


def rewrite(out: Path, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Replace a Parquet file of a complete run by what another version of the program could have written."""
    pq.write_table(change(pq.read_table(out / name)), out / name)
    files = json.loads((out / "manifest.json").read_text())["files"]
    reseal(out, files={**files, name: commits.describe(out / name)})


def at_version(table: pa.Table, version: str | None) -> pa.Table:
    """The table with another schema version in its metadata, or with none."""
    kept = {k: v for k, v in (table.schema.metadata or {}).items() if k != b"prefpipe.version"}
    return table.replace_schema_metadata(kept | ({} if version is None else {b"prefpipe.version": version.encode()}))
