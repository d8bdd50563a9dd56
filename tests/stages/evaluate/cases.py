"""What the tests of evaluations share: rows, settings, prompts, and runs with the fake engine."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.inputs.prompts import read_prompts
from prefpipe.runs import store
from prefpipe.runs.store import Manifest
from prefpipe.schemas import Evaluation, from_table
from prefpipe.stages.evaluate import stage
from tests.conftest import Write

LONG = "a quiet tool keeps water"
PAIRWISE = {"pairs": {"kind": "judge", "mode": "pairwise"}}


def row(prompt: str, decoding: str, reward: float | None, text: str = LONG, finish_reason: str = "stop") -> Evaluation:
    return Evaluation(
        f"{prompt}/{decoding}", prompt, 0, 0, decoding, [], text, [1], finish_reason, "weights:a", "mine:f", reward,
        "ok", None,
    )  # fmt: skip


def topics(count: int, name: str = "topic") -> list[dict[str, Any]]:
    """Rows of a file of prompts, all of them held out."""
    return [
        {"messages": [{"role": "user", "content": f"Tell me about {name} {i}."}], "answer": f"{i}", "split": "heldout"}
        for i in range(count)
    ]


def config(model: Path, prompts: Path, **changes: Any) -> EvaluateConfig:
    base = {"model": str(model), "prompts": str(prompts), "engine": "fake", "max_tokens": 80, "shard_rows": 2,
            "reward": "short_sentence"}  # fmt: skip
    return EvaluateConfig(**{**base, **changes})


def run(settings: EvaluateConfig, out: Path) -> Manifest:
    return stage.run(settings, out, force=False)


def summary(out: Path) -> str:
    """What the command prints of a complete run."""
    return "\n".join(stage.summary(store.read_manifest(out), out))


def rows_of(out: Path, dataset: str = "evaluations") -> list[Evaluation]:
    return from_table(Evaluation, store.read_dataset(out, dataset, Evaluation))


def prompts_file(write: Write, count: int, name: str = "prompts.jsonl", topic: str = "topic") -> Path:
    return write(*topics(count, topic), name=name)


def prompts_of(path: Path) -> Iterable[Any]:
    return read_prompts(path, "all", 0)[0]


def estimates_hold(values: Any, at: Sequence[str] = ()) -> list[str]:
    """The names of numbers outside of their interval, in totals of any depth."""
    if isinstance(values, list):
        return [name for i, v in enumerate(values) for name in estimates_hold(v, [*at, str(i)])]
    if not isinstance(values, dict):
        return []
    found = [name for k, v in values.items() for name in estimates_hold(v, [*at, k])]
    for name in values:
        ends = f"{name}_low", f"{name}_high"
        if ends[0] in values and not values[ends[0]] - 1e-9 <= values[name] <= values[ends[1]] + 1e-9:
            found.append(".".join([*at, name]))
    return found
