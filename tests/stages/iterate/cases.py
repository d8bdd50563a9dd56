"""Rounds that are small enough for every test, and a runner of steps without processes."""

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prefpipe import cli as commands
from prefpipe.config import base
from prefpipe.config.iterate import IterateConfig
from prefpipe.inference import warm
from prefpipe.stages.iterate import plan
from prefpipe.stages.iterate.plan import Known, Step
from prefpipe.stages.iterate.runners import Engines, Runner

Make = Callable[..., IterateConfig]
REWARD = "tests.e2e.letters:most_letters"
PER_ROUND = ("generate", "build-pairs", "train", "evaluate")
NO_STOPS = {"rules": []}
TOPICS = ("kettle", "owl", "harp", "bread", "rain", "salt")
HELD_OUT = ("moss", "tram")


def write_prompts(path: Path, topics: tuple[str, ...] = TOPICS, held_out: tuple[str, ...] = HELD_OUT) -> Path:
    """A file of prompts to train on and of held-out ones."""
    rows = [(topic, "train") for topic in topics] + [(topic, "heldout") for topic in held_out]
    lines = [{"messages": [{"role": "user", "content": f"Name a {t}."}], "answer": t, "split": s} for t, s in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(model: Path, prompts: Path, **changes: Any) -> dict[str, Any]:
    """Two rounds with the fake engine and a loss without reference, in float32; tables in `changes` are added to."""
    sampling = {"prompts": str(prompts), "engine": "fake", "dtype": "float32", "max_tokens": 8, "num_samples": 2}
    tables: dict[str, Any] = {
        "model": str(model),
        "rounds": 2,
        "stop": NO_STOPS,
        "generate": {**sampling, "rewards": [REWARD], "check": 0},
        "build_pairs": {"reward": REWARD, "truncated_chosen": "keep", "gap_filter": "none"},
        "train": {"dtype": "float32", "loss_type": ["simpo"], "lora_r": 2, "learning_rate": 1e-3},
        "evaluate": {**sampling, "reward": REWARD, "pass_reward": 0.8},
    }
    for name, value in changes.items():
        tables[name] = {**tables[name], **value} if isinstance(tables.get(name), dict) else value
    return tables


def config(model: Path, prompts: Path, **changes: Any) -> IterateConfig:
    """The settings as a config."""
    return IterateConfig.model_validate(settings(model, prompts, **changes))


def in_process(command: str, saved: Path, out: Path) -> None:
    """What a step's process does, without a process."""
    config_class, module = commands.STAGES[command]
    importlib.import_module(module).run(base.load(config_class, saved, {}), out, force=False)


class Inline:
    """In place of the processes of a run: every step runs in this one, so that a kill takes everything with it. An
    engine stays open as in theirs."""

    def __init__(self, _launcher: str, engines: Engines) -> None:
        self._engines = engines
        self._shelf = warm.shelf(engines.lora_rank)

    def __enter__(self) -> Runner:
        shelf = self._shelf.__enter__()

        def run(command: str, saved: Path, out: Path) -> None:
            shelf.keep = self._engines.after_evaluation if command == "evaluate" else self._engines.throughout
            in_process(command, saved, out)

        return run

    def __exit__(self, *error: Any) -> None:
        self._shelf.__exit__(*error)


def same(completions: list[Any], **_columns: Any) -> list[float]:
    """A reward that tells no answers apart."""
    return [0.0] * len(completions)


def never(command: str, saved: Path, out: Path) -> None:
    """A runner for runs with nothing left to do."""
    raise AssertionError(f"{command} was run again")


def adapters(out: Path, *rounds: int) -> list[bytes]:
    """The weights that rounds have trained."""
    return [(out / f"round-{n}/train/adapter/adapter_model.safetensors").read_bytes() for n in rounds]


def planned(config: IterateConfig, out: Path) -> Iterator[Step]:
    """The steps of all rounds, of which each is evaluated."""
    for number in range(config.rounds + 1):
        yield from plan.steps(config, out, number, Known(evaluated=max(0, number - 1)))
