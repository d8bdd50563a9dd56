"""Small runs of generate on disk, and what a test reads back from a run of build-pairs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import polars as pl

from prefpipe.config.build_pairs import BuildPairsConfig, unread
from prefpipe.config.generate import GenerateConfig
from prefpipe.ids import content_id, ids_digest
from prefpipe.runs import store, tables
from prefpipe.runs.store import Manifest
from prefpipe.schemas import Completion, Dropped, Message, Pair, Prompt, RefLogps, Reward, from_table, to_table
from prefpipe.stages import build_pairs

REWARD = "mine:f"
EOS = 2


@dataclass(frozen=True)
class Row:
    """What decides about a completion."""

    prompt_id: str
    completion_id: str
    reward: float | None
    text: str = "a text"
    finish_reason: str = "stop"
    num_tokens: int = 2
    policy: str = "weights:a"


SCHEMA = {
    "prompt_id": pl.String, "completion_id": pl.String, "reward": pl.Float64, "finish_reason": pl.String,
    "num_tokens": pl.UInt32,
}  # fmt: skip


def frame(rows: Sequence[Row]) -> pl.DataFrame:
    """Rows as candidates."""
    return pl.DataFrame([{name: getattr(r, name) for name in SCHEMA} for r in rows], schema=SCHEMA)


def ids_of(row: Row) -> list[int]:
    """num_tokens token ids that follow from the completion id, the last one an EOS."""
    letters = (row.completion_id * row.num_tokens).encode()
    return [*list(letters[: row.num_tokens - 1]), EOS]


def prompt_of(prompt_id: str, text: str | None = None) -> Prompt:
    return Prompt(prompt_id, [Message(role="user", content=text or f"about {prompt_id}")], None, "train", "", "{}")


def completion_of(row: Row) -> Completion:
    return Completion(
        row.completion_id, row.prompt_id, 0, row.text, [1, 5], ids_of(row), row.finish_reason, row.policy,
        ids_digest([1, 5], ids_of(row)),
    )  # fmt: skip


def logps_of(row: Row, reference: str, scale: float = 0.25) -> RefLogps:
    values = [-float(i) * scale for i in ids_of(row)]
    return RefLogps(
        row.completion_id, reference, "fake-1", ids_digest([1, 5], ids_of(row)), values, sum(values), len(values)
    )


def run_of(
    out: Path, rows: Sequence[Row], *, reference: str | None = "weights:a", name: str | None = REWARD,
    prompts: Sequence[Prompt] | None = None, shards: int = 1, scale: float = 0.25,
    others: Mapping[str, Mapping[str, float | None]] = MappingProxyType({}),
) -> Path:  # fmt: skip
    """A finished run of generate with these completions; a reward of None stands in the file as null. `others` are more
    rewards by name and completion id."""
    inputs = {"rows": content_id([vars(r) for r in rows], reference, name, shards, scale, json.dumps(dict(others)))}
    with store.open_run(out, "generate", GenerateConfig(), inputs, force=False) as run:
        known = prompts or [prompt_of(p) for p in sorted({r.prompt_id for r in rows})]
        run.write_part("prompts", Prompt, 0, to_table(Prompt, list(known)))
        for shard in range(shards):
            own = [r for n, r in enumerate(rows) if n % shards == shard]
            if reference is not None:
                logps = [logps_of(r, reference, scale) for r in own]
                run.write_part("ref_logps", RefLogps, shard, to_table(RefLogps, logps))
            if name is not None:
                rewards = [Reward(r.completion_id, name, r.reward, "ok", None) for r in own]
                run.write_part(f"rewards/{name}", Reward, shard, to_table(Reward, rewards))
            for other, values in others.items():
                rewards = [Reward(r.completion_id, other, values[r.completion_id], "ok", None)
                           for r in own if r.completion_id in values]  # fmt: skip
                run.write_part(f"rewards/{other}", Reward, shard, to_table(Reward, rewards))
            run.write_part("completions", Completion, shard, to_table(Completion, [completion_of(r) for r in own]))
        run.finish({}, {})
    return out


def fitting(changes: dict[str, Any]) -> dict[str, Any]:
    """The changes that the choices among them read."""
    left_out = unread({**dict(BuildPairsConfig()), **changes})
    return {name: value for name, value in changes.items() if name not in left_out}


def settings(*runs: Path, **changes: Any) -> BuildPairsConfig:
    """Settings that drop no pair for its gap, unless asked to."""
    pairs = fitting({"gap_filter": "none", **changes}).keys() & {"gap_filter"}
    values = {"completions": tuple(map(str, runs)), "reward": REWARD, **dict.fromkeys(pairs, "none"), **changes}
    return BuildPairsConfig.model_validate(values)


def build(out: Path, *runs: Path, **changes: Any) -> Manifest:
    return build_pairs.run(settings(*runs, **changes), out, force=False)


def pairs_of(out: Path) -> list[Pair]:
    return from_table(Pair, store.read_dataset(out, "pairs", Pair))


def ledger_of(out: Path) -> list[Dropped]:
    return from_table(Dropped, tables.read_parquet(out / "dropped.parquet"))
