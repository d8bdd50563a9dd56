"""Evaluations of the initial policy and of every variant, by `prefpipe evaluate` in a process whose engine takes one
adapter after the other."""

from collections.abc import Sequence
from pathlib import Path

from prefpipe import log
from prefpipe.config import base
from prefpipe.config.base import dump
from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.grid import Variant
from prefpipe.config.sweep import SweepConfig
from prefpipe.errors import UsageError
from prefpipe.ids import canonical_json
from prefpipe.runs import fsio
from prefpipe.stages.iterate.runners import Engines, Processes, Runner
from prefpipe.stages.sweep.training import FOLDER

_FOLDER = "evaluations"
_START = "start"


def start(out: Path) -> Path:
    """The folder with the evaluation of the initial policy."""
    return out / _FOLDER / _START


def place(out: Path, variant: Variant) -> Path:
    """The folder with the evaluation of a variant."""
    return out / _FOLDER / variant.name


def read(config: SweepConfig) -> EvaluateConfig | None:
    """The settings of the evaluations; None where the sweep names no recipe. Raises UsageError for a recipe that names
    a policy, or that lacks prompts or a reward, and as `load` does."""
    if not config.evaluate:
        return None
    table = base.load(EvaluateConfig, base.local_path(config.evaluate, "evaluate"), {})
    if not table.prompts or not table.reward:
        raise UsageError(f"{config.evaluate} names no prompts or no reward", "set both in that recipe")
    return table


def run(
    config: SweepConfig, table: EvaluateConfig, variants: Sequence[Variant], out: Path, runner: Runner | None = None
) -> None:
    """Evaluate the initial policy, then every variant against it. `runner` runs a step, by default in a process."""
    lora = {v.config.lora_r for v in variants if v.config.tuning == "lora"}
    engines = Engines(throughout=bool(lora), lora_rank=max(lora, default=0))
    with Processes(engines=engines) as processes:
        step = runner or processes
        policies: list[tuple[Path, str, str]] = [(start(out), config.model, config.adapter)]
        for variant in variants:
            trained = out / FOLDER / variant.name
            full = variant.config.tuning == "full"
            model, adapter = (str(trained / "model"), "none") if full else (config.model, str(trained / "adapter"))
            policies.append((place(out, variant), model, adapter))
        for number, (folder, model, adapter) in enumerate(policies):
            log.info(f"evaluation {number + 1}/{len(policies)}: {folder.name}")
            compared = (*((str(start(out)),) if number else ()), *table.baseline)
            settings = table.model_copy(update={"model": model, "adapter": adapter, "baseline": compared})
            saved = folder.with_name(f"{folder.name}.json")
            fsio.write_text(saved, canonical_json({"command": "evaluate", "config": dump(settings)}) + "\n")
            step("evaluate", saved, folder)
