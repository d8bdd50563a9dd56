"""What a step of training and a reference pass consist of: CPU seconds by kind of operation, one thread, no other side.

    python benchmarks/step_profile.py [--prompt 192] [--completion 64] [--pairs 4] [--whole] [--json FILE]

Every operation of a pass is timed in CPU seconds, so that other work on the machine does not count (it still costs
cache and turbo). "The rest" is the pass without this clock minus its operations: Python, autograd, dispatch. A step
takes turns with its bare forward and backward, whose median ratio is that of benchmarks/train_vs_trl.py.
"""

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prefpipe.config.train import TrainConfig
from prefpipe.forward import attention, load
from prefpipe.forward.layout import Tree
from prefpipe.forward.logps import TreeModel, score
from prefpipe.models import policy
from prefpipe.stages.train import loop
from prefpipe.stages.train.examples import TrainPair
from prefpipe.stages.train.micro_batches import micro_batches
from prefpipe.stages.train.optimizer import MasterOptimizer
from prefpipe.stages.train.parallel import ALONE

TOKENS = 768  # of a micro-batch, as in benchmarks/train_vs_trl.py
PRODUCTS, ATTENTION, COPIES, ELEMENTS, REST = (
    "matrix products", "attention", "copies", "element by element", "the rest",
)  # fmt: skip
_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}
_COPIES = {"cat", "copy_", "clone", "_to_copy", "index", "index_select", "embedding", "gather", "slice_backward"}


class Clock(TorchDispatchMode):
    """CPU seconds of the operations that run inside, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.process_time()
        result = func(*args, **(kwargs or {}))
        self.seconds[kind(func.overloadpacket.__name__)] += time.process_time() - start
        return result


def kind(name: str) -> str:
    """The kind of an operation of ATen."""
    if name in _PRODUCTS:
        return PRODUCTS
    if name.startswith("_scaled_dot_product"):
        return ATTENTION
    return COPIES if name in _COPIES else ELEMENTS


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def shares(work: Callable[[], object], whole: float) -> dict[str, float]:
    """The share of every kind in a pass that takes `whole` seconds without the clock."""
    with Clock() as clock:
        work()
    found = {name: clock.seconds[name] / whole for name in (PRODUCTS, ATTENTION, COPIES, ELEMENTS)}
    return {**found, REST: 1 - sum(found.values())}


def main() -> None:
    """Measure, print, and write JSON where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--prompt", type=int, default=192, help="tokens (default %(default)s)")
    parser.add_argument("--completion", type=int, default=64, help="tokens of each of two (default %(default)s)")
    parser.add_argument("--pairs", type=int, default=4, help="of a step (default %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--turns", type=int, default=3, help="of every pass, after one that does not count")
    parser.add_argument("--whole", action="store_true", help="attention over long rows at once, not in blocks")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.whole:
        attention._BLOCK = 1 << 30  # pyright: ignore[reportPrivateUsage]
    found = measure(given.model, given.dtype, given.prompt, given.completion, given.pairs, given.turns)
    for name, values in found.items():
        print(f"{name}:", ", ".join(f"{key} {value:.3f}" for key, value in values.items()))
    if given.json:
        given.json.write_text(
            json.dumps({"given": {k: str(v) for k, v in vars(given).items()}, **found}, indent=2) + "\n"
        )


def measure(
    model_name: str, dtype: str, prompt: int, completion: int, count: int, turns: int
) -> dict[str, dict[str, float]]:
    """CPU seconds of a reference pass and of a step, what they consist of, and the step over its bare passes."""
    base = load.load_model(policy.resolve(model_name).directory, dtype)
    model = TreeModel(load.add_lora(base, r=16, alpha=32, target_modules="all-linear", seed=0))
    pairs = _pairs(base.config.vocab_size, prompt, completion, count)
    config = TrainConfig(
        dtype=dtype,  # type: ignore[arg-type]  # one of the choices
        train_batch_size=count, num_train_epochs=turns + 2, max_tokens_per_micro_batch=TOKENS, learning_rate=1e-4,
    )  # fmt: skip
    optimizer = MasterOptimizer(model, 0.0)
    steps = loop.steps(loop.Trainer(model, model, optimizer, config, ALONE, TOKENS), pairs, 0)
    trees = [Tree(p.prompt_ids, (p.chosen, p.rejected)) for p in pairs]
    layouts = [model.layout(micro.trees) for micro in micro_batches(pairs, TOKENS)]

    def reference() -> None:
        with load.adapter_off(model.policy, off=True):
            list(score(model, trees))

    def step() -> None:
        next(steps)

    def bare() -> None:
        for layout in layouts:
            model(layout).sum().backward()

    taken: dict[str, list[float]] = {work.__name__: [] for work in (reference, step, bare)}
    for turn in range(turns + 1):
        for work in (reference, step, bare):
            passed = seconds(work)
            if turn:
                taken[work.__name__].append(passed)
        optimizer.drop_gradients()
    typical = {name: median(values) for name, values in taken.items()}
    ratios = [s / b for s, b in zip(taken["step"], taken["bare"], strict=True)]
    return {
        "CPU seconds": typical,
        "step / bare forward and backward": {"median": median(ratios), "least": min(ratios), "most": max(ratios)},
        "reference pass": shares(reference, typical["reference"]),
        "step": shares(step, typical["step"]),
    }


def _pairs(vocabulary: int, prompt: int, completion: int, count: int) -> list[TrainPair]:
    source, known, refs = random.Random(0), range(4, vocabulary), (-1.0,) * completion

    def ids(number: int) -> tuple[int, ...]:
        return tuple(source.choices(known, k=number))

    return [
        TrainPair(str(i), "", "", ids(prompt), ids(completion), ids(completion), refs, refs, 1.0) for i in range(count)
    ]


if __name__ == "__main__":
    main()
