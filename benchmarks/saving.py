"""How long training waits for its checkpoints: written while it waits, and beside it from a copy.

    python benchmarks/saving.py [--megabytes 60] [--steps 14] [--every 4] [--folder DIR] [--json FILE]

A random Llama in float32 on the CPU, all weights trained; a checkpoint has three times the bytes of its weights. The
same steps run twice, and the checkpoints must have the same bytes. Counted are the seconds of the whole loop, those
that it waits for checkpoints, and the most resident memory above that at its start.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ranks import make, rows

from prefpipe import memory
from prefpipe.config.train import TrainConfig
from prefpipe.models.policy import resolve
from prefpipe.reading import file_digest
from prefpipe.stages.train import checkpoint, loading, loop, parallel, process_memory
from prefpipe.stages.train.background import Background
from prefpipe.stages.train.loop import Trainer
from prefpipe.stages.train.optimizer import MasterOptimizer

ALONE = parallel.ALONE


def shape(megabytes: float) -> dict[str, int]:
    """Sizes of a model of about so many megabytes of float32 weights: layers of 2.9 MB and an embedding of 1.2."""
    layers = max(1, round((megabytes - 1.2) / 2.9))
    return {"hidden_size": 256, "intermediate_size": 680, "num_hidden_layers": layers, "vocab_size": 1200}


def train(directory: Path, out: Path, steps: int, every: int, *, beside: bool) -> dict[str, float]:
    """The steps of a run with a checkpoint after every so many of them, but for the last, whose checkpoint always
    waits."""
    config = TrainConfig(
        model=str(directory), pairs=("generated",), dtype="float32", tuning="full", train_batch_size=4,
        num_train_epochs=steps, learning_rate=1e-4, max_tokens_per_micro_batch=64,
    )  # fmt: skip
    model = loading.load_policy(resolve(str(directory)), config, ALONE)
    trainer = Trainer(model, model, MasterOptimizer(model, 0.0), config, ALONE, 64)
    saving, waited, held = Background(ALONE), 0.0, process_memory.resident_memory()
    assert process_memory.restart_resident_peak()
    start = time.monotonic()
    for step in loop.steps(trainer, rows(), 0):
        saving.after_step()
        done = step.step + 1
        if done % every == 0 and done < steps:

            def write(tensors: Any, world: parallel.World, done: int = done) -> None:
                checkpoint.save(out, checkpoint.Checkpoint(done, 0, "", tensors), "f", limit=steps, world=world)

            begin = time.monotonic()
            saving.wait()
            saving.save(done, trainer.optimizer.state(), write, last=not beside)
            waited += time.monotonic() - begin
    begin = time.monotonic()
    saving.wait()
    waited += time.monotonic() - begin
    return {
        "loop_seconds": round(time.monotonic() - start, 2),
        "waited_seconds": round(waited, 2),
        "peak_mb": round((memory.resident_peak() - held) / 1e6, 1),
    }


def digests(out: Path) -> dict[str, str]:
    """Of every file of the checkpoints."""
    return {str(path.relative_to(out)): file_digest(path) for path in sorted(out.rglob("*")) if path.is_file()}


def main() -> None:
    """Measure, print, and write JSON where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=60, help="of weights (default %(default)s)")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--every", type=int, default=4, help="steps between checkpoints")
    parser.add_argument("--folder", type=Path, help="where the checkpoints lie")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        make(folder / "model", shape(given.megabytes))
        train(folder / "model", folder / "first", 2, 1, beside=False)  # allocators and files as later runs find them
        found: dict[str, Any] = {"load": os.getloadavg()[0]}
        for kind in ("waits", "beside"):
            found[kind] = train(folder / "model", folder / kind, given.steps, given.every, beside=kind == "beside")
        assert digests(folder / "waits") == digests(folder / "beside")
        size = sum(path.stat().st_size for path in (folder / "waits").rglob("*.safetensors"))
        found["checkpoints_mb"] = round(size / 1e6, 1)
    print(json.dumps(found, indent=2))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
