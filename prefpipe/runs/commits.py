"""Which files of a run directory count, and whether they are intact.

A shard counts when its commit record does: `part-00000.ok.json` beside `part-00000.parquet`. A directory that `train`
publishes counts when it exists, because it is renamed into place whole.
"""

import json
from pathlib import Path
from typing import Any

from prefpipe.runs import fsio

_PUBLISHED = ("adapter", "model", "merged")
_REPORTS = ("metrics.jsonl", "parity.json", "data_report.json")


def commit(part: Path, row_type: type, rows: int, fingerprint: str) -> None:
    """Write the commit record of a file with so many rows: from here on the file counts."""
    record = {"dataset": row_type.__name__, **describe(part), "rows": rows, "fingerprint": fingerprint}
    fsio.write_text(record_path(part), json.dumps(record) + "\n")


def record_path(part: Path) -> Path:
    """The commit record of a Parquet file."""
    return part.with_name(part.name.removesuffix(".parquet") + ".ok.json")


def describe(path: Path) -> dict[str, Any]:
    """Size in bytes and blake3 of a file."""
    return {"bytes": path.stat().st_size, "blake3": fsio.file_digest(path)}


def matches(path: Path, digest: str) -> bool:
    """Whether a file is there and has this digest."""
    return path.is_file() and fsio.file_digest(path) == digest


def matches_record(part: Path) -> bool:
    """Whether a file is what its commit record says. A damaged record describes no file."""
    try:
        digest = json.loads(record_path(part).read_text(encoding="utf-8"))["blake3"]
    except (ValueError, KeyError, TypeError):
        return False
    return matches(part, str(digest))


def committed(out: Path) -> list[Path]:
    """Every file that belongs into the manifest: shards with a record, published directories, reports."""
    parts = [r.with_name(r.name.removesuffix(".ok.json") + ".parquet") for r in out.rglob("*.ok.json")]
    published = [p for folder in _PUBLISHED for p in (out / folder).rglob("*") if p.is_file()]
    reports = [out / name for name in _REPORTS if (out / name).exists()]
    return sorted(p for p in [*parts, *published, *reports] if "quarantine" not in p.relative_to(out).parts)


def remade_with(name: str) -> list[str]:
    """What must be made again with a damaged file.

    A shard alone, a published directory whole, metrics with everything that the training made.
    """
    if name.endswith(".parquet"):
        return [name]
    if name != "metrics.jsonl":
        return [name.split("/")[0]]
    return [name, *_PUBLISHED, "checkpoints"]
