"""Run by test_memory as a process alone: the activations that are predicted and what the process takes, in bytes."""

import sys
from pathlib import Path

from prefpipe.forward.layout import Tree
from prefpipe.memory import resident_peak
from prefpipe.stages.train import memory, process_memory
from tests.stages.train import data


def trees(count: int, completion: int = 20) -> list[Tree]:
    """Trees of 24 + 2 * `completion` tokens."""
    return [Tree([5 + i] * 24, ([7 + i] * completion, [9 + i] * completion)) for i in range(count)]


def main(model_directory: Path) -> None:
    model = data.policy(model_directory)
    start = process_memory.resident_memory()
    predicted = memory.measure(model, trees(1, 200)).activations(1696)  # four times the small probe
    process_memory.restart_resident_peak()
    for _ in range(2):
        memory._kept(model, trees(4, 200))
    print(predicted, resident_peak() - start)  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
