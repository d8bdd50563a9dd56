"""Run by test_forecast as a process alone: the bytes that a rank is predicted to need, and those that it takes at the
highest point of two steps, counted from before the model is loaded. Each way to train has a child of its own, which
shares the imports with the others and nothing else."""

import multiprocessing
import random
import sys
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  (children share it)

from prefpipe.config.train import TrainConfig
from prefpipe.forward import load
from prefpipe.forward.logps import TreeModel
from prefpipe.memory import resident_peak
from prefpipe.stages.train import loop, memory, process_memory
from prefpipe.stages.train.examples import TrainPair
from prefpipe.stages.train.forecast import Forecast, Setting
from prefpipe.stages.train.micro_batches import tree_of
from prefpipe.stages.train.optimizer import MasterOptimizer
from prefpipe.stages.train.parallel import ALONE


def pairs() -> list[TrainPair]:
    """Two pairs of 400 + 2 * 200 tokens."""
    source = random.Random(0)
    known = (-1.0,) * 200

    def ids(count: int) -> tuple[int, ...]:
        return tuple(source.choices(range(3, 200), k=count))

    return [TrainPair(str(n), "c", "r", ids(400), ids(200), ids(200), known, known, 1.0) for n in range(2)]


def train(directory: Path, config: TrainConfig) -> None:
    """Two steps of one pair."""
    policy: Any = load.load_model(directory, "float32")
    if config.tuning == "lora":
        policy = load.add_lora(policy, r=16, alpha=32, target_modules="all-linear", seed=0)
    else:
        load.train_all(policy)
    model = TreeModel(policy)
    memory.checkpoint_if(model, on=config.gradient_checkpointing == "on")
    trainer = loop.Trainer(model, model, MasterOptimizer(model, 0.0), config, ALONE, config.max_tokens_per_micro_batch)
    process_memory.return_free_memory()
    process_memory.restart_resident_peak()
    for _ in loop.steps(trainer, pairs(), 0).metrics:
        pass


def measure(directory: Path, warm: Path, tuning: Any, checkpointing: Any) -> None:
    """`warm` is a tiny model, whose steps load the code and the buffers of libraries."""
    torch.set_num_threads(1)
    tree = tree_of(pairs()[0])
    config = TrainConfig(
        model=str(directory), dtype="float32", tuning=tuning, train_batch_size=1,
        max_tokens_per_micro_batch=tree.num_tokens, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    setting = Setting(1, 1, "ddp", checkpointing == "on", tuning, in_4bit=False)
    need = Forecast(config, directory, None, tree).need(setting)
    train(warm, config)
    process_memory.return_free_memory()
    start = process_memory.resident_memory()
    train(directory, config)
    print(need.peak, resident_peak() - start)  # noqa: T201


def main(directory: Path, warm: Path, *ways: str) -> None:
    """A line for each of `ways`, such as `lora/on`, one after the other."""
    for way in ways:
        child = multiprocessing.get_context("fork").Process(target=measure, args=(directory, warm, *way.split("/")))
        child.start()
        child.join()
        if child.exitcode:
            sys.exit(f"{way} ended with {child.exitcode}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
