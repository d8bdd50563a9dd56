"""What several workers cost and bring: the driver's CPU, the price of a shard, two workers against one, and 256.

    python benchmarks/scale.py [--quick] --json FILE [--plot FILE.svg]

The fake engine on a random two-layer model, so that nothing is measured but prefpipe. CPU seconds and ratios hold on a
busy machine; `two workers` and the simulation compare wall times and need two idle cores.
"""

import argparse
import json
import multiprocessing
import os
import pickle
import queue
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prefpipe.engines.base import Request, Sample
from prefpipe.engines.fake import FakeEngine

ROOT = Path(__file__).resolve().parents[1]
NUM_SAMPLES, SHARD_ROWS = 8, 64
BUSY_BYTES = 1 << 22  # hashed for each sample: milliseconds of CPU
SHARD_S = 1.0  # a simulated worker makes a shard in so many seconds
ROUNDS = 9  # of which the median counts
WORKERS = (1, 4, 16, 64, 256)


class Busy(FakeEngine):
    """The fake engine at the price of a model: CPU for every sample."""

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Sample]]]:
        """As the fake engine."""
        block = bytes(BUSY_BYTES)
        for request, samples in super().generate(requests):
            for _ in samples:
                blake2b(block).digest()
            yield request, samples


class Simulated:
    """A backend of workers that need no CPU: each says all that one says of a shard (as messages) again and again, in
    its time."""

    start_s = 60.0

    def __init__(self, messages: list[bytes], count: int) -> None:
        self._messages, self._count = messages, count
        self._due: list[tuple[float, int, int]] = []  # (when, worker, shard)
        self._said: list[tuple[int, Any]] = []
        self._begun: set[int] = set()

    def start(self, number: int) -> None:
        """Every worker is ready at once."""
        from prefpipe.inference.pool_messages import Ready, Up

        self._said += [(number, Up()), (number, Ready({}))]

    def send(self, number: int, message: Any) -> None:
        """A lease becomes a shard after its time."""
        from prefpipe.inference.pool_messages import Drain, Drained, Took
        from prefpipe.inference.works import Lease

        if isinstance(message, Lease):
            pickle.dumps(message)  # as over a socket
            mine = [when for when, worker, _ in self._due if worker == number]
            apart = 0.0 if number in self._begun else SHARD_S * number / self._count  # not all at the same moment
            self._begun.add(number)
            start = max([time.monotonic() + apart, *mine])
            self._due.append((start + SHARD_S, number, message.index))
            if not mine:
                self._said.append((number, Took()))
        elif isinstance(message, Drain):
            self._said.append((number, Drained()))

    def wait(self, timeout: float) -> list[tuple[int, Any]]:
        """What is due."""
        from prefpipe.inference.pool_messages import Done, Took

        if not self._said and self._due:
            time.sleep(max(0.0, min(timeout, min(self._due)[0] - time.monotonic())))
        due = sorted(entry for entry in self._due if entry[0] <= time.monotonic())
        self._due = [entry for entry in self._due if entry not in due]
        said, self._said = self._said, []
        for _, number, index in due:
            for event in map(pickle.loads, self._messages):
                renumbered = Done(replace(event.shard, index=index)) if isinstance(event, Done) else event
                said.append((number, renumbered))
            said.append((number, Took()))
        return said

    def stop(self, number: int) -> None:
        """Nothing runs."""

    def close(self, *, gently: bool) -> None:
        """Nothing runs."""


def config(folder: Path, prompts: int, **changes: Any) -> Any:
    """Settings of a run of generate on the tiny model."""
    from prefpipe.config.generate import GenerateConfig
    from tests.tiny import make_model

    model, file = folder / "model", folder / f"{prompts}.jsonl"
    if not model.exists():
        make_model(model)
    if not file.exists():
        file.write_text("".join(json.dumps({"prompt": f"Tell me about bird {i}."}) + "\n" for i in range(prompts)))
    return GenerateConfig(
        model=str(model), prompts=str(file), engine="fake", num_samples=NUM_SAMPLES, shard_rows=SHARD_ROWS, check=0,
        rewards=("short_sentence",), **changes,
    )  # fmt: skip


def sampled(folder: Path, prompts: int, workers: int, engine: str) -> dict[str, float]:
    """CPU of this process and wall time from the first committed shard to the last one, per completion."""
    from prefpipe import engines
    from prefpipe.inference import filling
    from prefpipe.stages.generate import stage

    engines.ENGINES["fake"] = engine
    marks: list[tuple[float, float, int]] = []
    plain = filling.write

    def write(run: Any, whole: Any) -> int:
        count = plain(run, whole)
        marks.append((time.process_time(), time.monotonic(), len(whole)))
        return count

    filling.write = write
    with tempfile.TemporaryDirectory(dir=folder) as out:
        stage.run(config(folder, prompts, workers=workers), Path(out) / "g", force=False)
    completions = sum(shards for _, _, shards in marks[1:]) * SHARD_ROWS * NUM_SAMPLES
    (cpu, wall, _), (cpu_end, wall_end, _) = marks[0], marks[-1]
    return {"cpu": (cpu_end - cpu) / completions, "wall": (wall_end - wall) / completions}


def a_shard(folder: Path) -> tuple[Any, Any, Any, float]:
    """(work, lease, engine, CPU seconds to make it) of one shard of the fake engine, made in this process."""
    from prefpipe.inference import pool
    from prefpipe.inference.works import Lease
    from prefpipe.stages.generate import stage

    seen: list[Any] = []
    plain = pool.Inline.run

    def run(self: Any, work: Any, shards: Any, *rest: Any) -> Iterator[Any]:
        content, finished, costs = list(shards), list[Any](), list[float]()
        for _ in range(ROUNDS):
            begin = time.process_time()
            finished = list(plain(self, work, iter(content), *rest))
            costs.append(time.process_time() - begin)
        seen[:] = [work, Lease(*content[0]), self.engine, statistics.median(costs)]
        yield from finished

    pool.Inline.run = run
    try:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            stage.run(config(folder, SHARD_ROWS, workers=1), Path(out) / "g", force=False)
    finally:
        pool.Inline.run = plain
    return tuple(seen)


def said_of(work: Any, lease: Any, engine: Any) -> list[Any]:
    """What a worker says while it makes a shard."""
    from prefpipe.inference.pool_messages import Drain
    from prefpipe.inference.pool_worker import Voice, _run

    said, inbox = list[Any](), queue.SimpleQueue[Any]()
    inbox.put(Drain())
    _run(Voice(said.append), inbox, work, lease, engine)
    return said


def overhead(folder: Path) -> dict[str, float]:
    """CPU to carry one shard there and back through a socket, both ends counted, over the CPU to sample, rate and build
    it."""
    work, lease, engine, cpu = a_shard(folder)
    messages = [lease, *said_of(work, lease, engine)]
    here, there = multiprocessing.Pipe()  # whose buffer holds a message of a shard, 100 KB
    costs: list[float] = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        for message in messages:
            here.send_bytes(pickle.dumps(message))
            there.recv()
        costs.append(time.process_time() - begin)
    return {"share": statistics.median(costs) / cpu}


@contextmanager
def counted_syncs() -> Generator[list[int]]:
    """The descriptors that are synced in the `with` block, each as often as it is."""
    plain, seen = os.fsync, list[int]()

    def fsync(descriptor: int) -> None:
        seen.append(descriptor)
        plain(descriptor)

    os.fsync = fsync
    try:
        yield seen
    finally:
        os.fsync = plain


def simulated(folder: Path, workers: int, shards: int) -> dict[str, float]:
    """Completions per second that a driver commits with so many simulated workers, its CPU for each, and how often it
    syncs a file or a folder for a shard."""
    from prefpipe.inference.inflight import Inflight
    from prefpipe.inference.pool import Workers
    from prefpipe.inference.pool_messages import Done, Noted
    from prefpipe.inference.works import write
    from prefpipe.runs import store

    work, lease, engine, _ = a_shard(folder)
    said = [event for event in said_of(work, lease, engine) if isinstance(event, Noted | Done)]
    backend = Simulated([pickle.dumps(event) for event in said], workers)
    with tempfile.TemporaryDirectory(dir=folder) as out, store.open_run(
        Path(out) / "g", "generate", config(folder, SHARD_ROWS), {}, force=False
    ) as run:  # fmt: skip
        pool = Workers(backend, b"", workers)
        source = ((index, lease.content) for index in range(shards))
        begin, cpu = time.monotonic(), time.process_time()
        with counted_syncs() as syncs:
            for whole in pool.run(work, source, Inflight.load(run.out), lambda *_: None):
                write(run, whole)
        completions = shards * SHARD_ROWS * NUM_SAMPLES
        return {
            "rate": completions / (time.monotonic() - begin),
            "cpu": (time.process_time() - cpu) / completions,
            "syncs": len(syncs) / shards,
        }


def in_process(name: str, folder: Path, *arguments: Any) -> dict[str, float]:
    """One measurement in a fresh process with one thread."""
    command = [sys.executable, __file__, "--json", os.devnull, "--worker", name, str(folder), *map(str, arguments)]
    path = os.pathsep.join((str(ROOT), str(ROOT / "benchmarks")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def worker(name: str, folder: str, *arguments: str) -> dict[str, float]:
    """A measurement by its name."""
    if name == "sampled":
        prompts, workers, engine = arguments
        return sampled(Path(folder), int(prompts), int(workers), engine)
    if name == "overhead":
        return overhead(Path(folder))
    return simulated(Path(folder), *map(int, arguments))


def measure(folder: Path, *, quick: bool) -> Iterator[tuple[str, float, str, float | None, bool | None]]:
    """(name, figure, unit, goal, whether it holds) of every bar."""
    fake, busy = "prefpipe.engines.fake:FakeEngine", "scale:Busy"
    prompts = SHARD_ROWS * (9 if quick else 33)
    one, two = (in_process("sampled", folder, prompts, count, fake) for count in (1, 2))
    share = two["cpu"] / one["cpu"]
    yield "CPU of the driver with two workers / of one process", share, "ratio", 0.25, share <= 0.25
    share = in_process("overhead", folder)["share"]
    yield "CPU to carry a shard / to make it", share, "ratio", 0.05, share <= 0.05
    prompts = SHARD_ROWS * (5 if quick else 17)
    one, two = (in_process("sampled", folder, prompts, count, busy) for count in (1, 2))
    speed = one["wall"] / two["wall"]
    yield "completions per second, two workers / one", speed, "ratio", 1.7, speed >= 1.7
    counts = WORKERS[: 2 if quick else None]
    found = dict[int, dict[str, float]]()
    for count in counts:
        found[count] = in_process("simulated", folder, count, max(8, count * 4))
        yield f"simulated workers = {count}: completions per second", found[count]["rate"], "1/s", None, None
        yield f"simulated workers = {count}: CPU of the driver", found[count]["cpu"], "s", None, None
        yield f"simulated workers = {count}: syncs of a shard", found[count]["syncs"], "1", None, None
    if not quick:
        share = found[counts[-1]]["rate"] * found[predicting(counts)]["cpu"]
        name = (
            f"completions per second, {counts[-1]} simulated workers / predicted from the CPU with {predicting(counts)}"
        )
        yield name, share, "ratio", 0.8, share >= 0.8


def predicting(counts: Sequence[int]) -> int:
    """The number of workers whose CPU for a completion predicts the limit: a driver that is not busy all the time."""
    return sorted(counts)[len(counts) // 2]


def plot(figures: list[dict[str, Any]], path: Path) -> None:
    """Completions per second over simulated workers, beside the rate that the workers would have without a driver and
    the limit that its CPU per completion predicts."""
    import altair as alt

    def of(what: str) -> dict[int, float]:
        named = (f for f in figures if f["name"].endswith(what))
        return {int(f["name"].split(" = ")[1].split(":")[0]): f["figure"] for f in named}

    rates, cpu = of("completions per second"), of("CPU of the driver")
    points = [
        {"workers": count, "rate": rate, "what": what}
        for count in rates
        for what, rate in (
            ("measured", rates[count]),
            ("of the workers alone", count * SHARD_ROWS * NUM_SAMPLES / SHARD_S),
            ("limit of one driver", 1 / cpu[predicting([*cpu])]),
        )
    ]
    scale = alt.Scale(type="log")
    chart = alt.Chart(alt.Data(values=points)).mark_line(point=True).encode(
        x=alt.X("workers:Q", title="simulated workers", scale=scale),
        y=alt.Y("rate:Q", title="completions per second", scale=scale),
        color=alt.Color("what:N", title=None),
    )  # fmt: skip
    chart.properties(width=420, height=280).save(str(path))


def main() -> None:
    """Measure every bar, print it, write the figures and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less work for each figure")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(*arguments.worker)))
        return
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, figure, unit, goal, holds in measure(Path(folder), quick=arguments.quick):
            figures.append(
                {"name": name, "figure": figure, "unit": unit, "goal": goal, "holds": holds,
                 "command": "python benchmarks/scale.py --json FILE", "versions": {"pyarrow": version("pyarrow")}}
            )  # fmt: skip
            print(f"{name:<55} {figure:>12.5g} {unit}{'' if holds is None else f'  {goal}: {holds}'}", flush=True)
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    if arguments.plot:
        plot(figures, arguments.plot)


if __name__ == "__main__":
    main()
