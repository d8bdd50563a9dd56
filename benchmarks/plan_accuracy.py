"""`prefpipe plan`'s predicted peak against the measured one, in three settings on SmolLM2-135M.

    python benchmarks/plan_accuracy.py [--quick] --json FILE

Each setting trains two steps in a process of its own; measured is the growth of resident memory from before the model
is loaded to the highest point of a step.
"""

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from train_vs_trl import MODEL, ROOT, Peak

SETTINGS = (("float32", 640), ("float32", 1280), ("bfloat16", 1280))
GOAL = 0.15


def main() -> None:
    """Run the settings, print one table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first setting only")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker[0], int(arguments.worker[1]), arguments.json)
        return
    figures: list[dict[str, Any]] = []
    for dtype, tokens in SETTINGS[:1] if arguments.quick else SETTINGS:
        command = [sys.executable, __file__, "--json", str(arguments.json), "--worker", dtype, str(tokens)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
        found = json.loads(arguments.json.read_text())
        error = found["predicted"] / found["measured"] - 1
        predicted, measured = (found[key] / 2**20 for key in ("predicted", "measured"))
        name = f"{dtype}, {tokens} tokens: predicted {predicted:.0f}, measured {measured:.0f} MiB"
        figures.append(
            {"name": name, "figure": error, "unit": "relative", "goal": GOAL, "holds": abs(error) <= GOAL,
             "command": "python benchmarks/plan_accuracy.py --json FILE", "versions": {"torch": version("torch")}}
        )  # fmt: skip
        print(f"{name}: off by {error:+.1%}")
    arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def worker(dtype: str, tokens: int, out: Path) -> None:
    """Predict from a probe, then train two steps and measure."""
    import random

    import torch

    from prefpipe.config.train import TrainConfig
    from prefpipe.forward import load
    from prefpipe.forward.layout import Tree
    from prefpipe.forward.logps import TreeModel
    from prefpipe.models import policy
    from prefpipe.stages.train import loop, memory
    from prefpipe.stages.train.examples import TrainPair
    from prefpipe.stages.train.optimizer import MasterOptimizer
    from prefpipe.stages.train.parallel import World

    torch.set_num_threads(1)
    source = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(source.choices(range(100, 40000), k=count))

    pairs = [TrainPair(str(i), "", "", ids(192), ids(64), ids(64), (-1.0,) * 64, (-1.0,) * 64, 1.0) for i in range(16)]
    config = TrainConfig(dtype=dtype, train_batch_size=8, max_tokens_per_micro_batch=tokens)  # type: ignore[arg-type]  # one of SETTINGS, from the command line
    directory = policy.resolve(MODEL).directory
    peak = Peak()
    base = load.load_model(directory, dtype)
    model = TreeModel(load.add_lora(base, r=16, alpha=32, target_modules="all-linear", seed=0))
    footprint = memory.measure(model, [Tree(p.prompt_ids, (p.chosen, p.rejected)) for p in pairs[:1]])
    trainer = loop.Trainer(model, model, MasterOptimizer(model, 0.0), config, World(0, 1), tokens)
    for _ in loop.steps(trainer, pairs, 0):
        pass
    out.write_text(json.dumps({"predicted": footprint.peak(tokens), "measured": peak.growth()}))


if __name__ == "__main__":
    main()
