"""What a rank takes that shares a model with others (`--distributed fsdp2`), and whether its weights are those of one
process.

    python benchmarks/ranks.py [--ranks 1 2 4] [--tuning lora full] [--steps 5] [--tiny] [--json FILE]

A random Llama of 346 M parameters in float32, on CPU, over gloo. Every process loads it as a run does, tests token
trees against plain passes, trains on rows of about 25 tokens (trees, chunked head, checkpointing) and saves a
checkpoint. Counted is the most resident memory in each of these phases, above that at the end of a tiny run before it:
Python, its modules and threads take about 0.5 GB in any process, and would hide the model. In all of them glibc gives
blocks of 64 KiB back when they are freed, as it does in ranks that share a model (`return_blocks_at_once`).
"""

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GOALS = {2: 0.62, 4: 0.40}  # of the peak of one process, by ranks
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 300}
LARGE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 48, "vocab_size": 8000}
BUDGET = 64  # tokens of a micro-batch: two rows


def make(directory: Path, size: dict[str, int]) -> None:
    """A random model with tied embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**size, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(directory)


def rows() -> list[Any]:
    """Four pairs with reference values."""
    from prefpipe.stages.train.examples import TrainPair

    draw = random.Random(0)

    def ids(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 260) for _ in range(draw.randint(least, most)))

    found: list[TrainPair] = []
    for number in range(4):
        prompt, chosen, rejected = ids(4, 12), ids(2, 10), ids(2, 10)
        values = [(-1.0,) * len(side) for side in (chosen, rejected)]
        found.append(TrainPair(f"p{number}", f"c{number}", f"r{number}", prompt, chosen, rejected, *values, 1.0))
    return found


class Phases:
    """The most bytes in every phase, above those at the start, and its seconds."""

    def __init__(self) -> None:
        from prefpipe.memory import resident_peak
        from prefpipe.stages.train import process_memory

        self._memory, self._peak = process_memory, resident_peak
        gc.collect()
        self.start = process_memory.resident_memory()
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count what the block takes."""
        assert self._memory.restart_resident_peak()
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 2)
        self.peaks[name] = self._peak() - self.start


def train(directory: Path, tuning: str, steps: int, out: Path, world: Any) -> dict[str, Any]:
    """A run from the model's files to its checkpoint: what its phases take, and the loss of every step."""
    from prefpipe.config.train import TrainConfig
    from prefpipe.models.policy import resolve
    from prefpipe.stages.train import checkpoint, loading, loop, memory, parallel
    from prefpipe.stages.train.loop import Trainer
    from prefpipe.stages.train.optimizer import MasterOptimizer

    config = TrainConfig(
        model=str(directory), pairs=("generated",), dtype="float32", distributed="fsdp2", tuning=tuning,
        train_batch_size=4, num_train_epochs=steps, learning_rate=1e-4, max_grad_norm=1e9,
        max_tokens_per_micro_batch=BUDGET,
    )  # fmt: skip
    pairs, phases = rows(), Phases()
    with phases.of("load"):
        model = loading.load_policy(resolve(str(directory)), config, world)
    with phases.of("self-test"):
        loading.choose_rows(model, pairs, config.dtype)
    memory.checkpoint_if(model, on=True)
    wrapped = parallel.wrap(model, world, config.distributed)
    with phases.of("steps"):
        trainer = Trainer(model, wrapped, MasterOptimizer(wrapped, 0.0), config, world, BUDGET)
        losses = [step.values["loss"] for step in loop.steps(trainer, pairs, 0)]
    with phases.of("checkpoint"):
        state = checkpoint.Checkpoint(steps, 0, "", trainer.optimizer.state())
        checkpoint.save(out, state, "f", world=world)
    return {"peaks": phases.peaks, "seconds": phases.seconds, "before": phases.start, "losses": losses}


def rank(folder: Path, tuning: str, steps: int, out: Path) -> None:
    """One process: the tiny run, then the one that counts; writes OUT/rank-R.json."""
    from prefpipe.stages.train import parallel

    world = parallel.start()
    train(folder / "tiny", tuning, 2, out / "tiny", world)
    found = train(folder / "model", tuning, steps, out, world)
    (out / f"rank-{world.rank}.json").write_text(json.dumps(found))
    parallel.stop(world)


def largest_difference(ours: Path, theirs: Path) -> float:
    """Between trained weights in two checkpoints."""
    from prefpipe.forward import tensor_files

    one, other = (
        {n: t for path in sorted(out.glob("step-*/*.safetensors")) for n, t in tensor_files.stored(path).items()}
        for out in (ours, theirs)
    )
    names = [name for name in other if name.startswith("master/")]
    return max(float((one[name].whole() - other[name].whole()).abs().max()) for name in names)


def measure(folder: Path, tuning: str, ranks: int, steps: int) -> dict[str, Any]:
    """The worst rank's peaks in MB, and the losses."""
    out = folder / f"{tuning}-{ranks}"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    own = ["--rank", str(folder), "--tuning", tuning, "--steps", str(steps), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    subprocess.run([sys.executable, *launcher, __file__, *own], env=environment, check=True)
    found = [json.loads(path.read_text()) for path in sorted(out.glob("rank-*.json"))]
    return summary(found, ranks)


def summary(found: Sequence[dict[str, Any]], ranks: int) -> dict[str, Any]:
    """Of all ranks: the highest peak of each phase in MB; of the first: seconds and losses."""
    assert len(found) == ranks
    peaks = {name: round(max(rank["peaks"][name] for rank in found) / 1e6, 1) for name in found[0]["peaks"]}
    of_first = {name: found[0][name] for name in ("seconds", "losses")}
    return {"ranks": ranks, **peaks, "peak": max(peaks.values()), **of_first}


def main() -> None:
    """Measure, print a table, and write JSON where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="1 must be the first")
    parser.add_argument("--tuning", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a model that shows only that the script works")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.rank and given.ranks[0] != 1:
        parser.error("--ranks begins with 1: the others are compared with one process")
    if given.rank:
        rank(given.rank, given.tuning[0], given.steps, given.out)
        return
    measured: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder / "tiny", TINY)
        make(folder / "model", TINY if given.tiny else LARGE)
        for tuning in given.tuning:
            for ranks in given.ranks:
                found = {"tuning": tuning, **measure(folder, tuning, ranks, given.steps)}
                alone = next(m for m in [*measured, found] if m["tuning"] == tuning)
                found["share"] = round(found["peak"] / max(alone["peak"], 0.1), 3)
                found["goal"] = GOALS.get(ranks)
                found["difference"] = largest_difference(folder / f"{tuning}-{ranks}", folder / f"{tuning}-1")
                measured.append(found)
                print({key: value for key, value in found.items() if key != "losses"}, flush=True)
                if given.json:
                    given.json.write_text(json.dumps({"load": os.getloadavg()[0], "runs": measured}, indent=2) + "\n")


if __name__ == "__main__":
    main()
