"""A Ray cluster of two nodes with a CPU each, and runs on it; a script for a network namespace of its own.

    python -m tests.inference.cluster MODEL PROMPTS FOLDER TEMPORARY

Ray listens on every address without asking who comes: the namespace has only loopback. The script ends in the middle of
a run, by kill -9. test_pool_ray looks at what it leaves in FOLDER. The sockets of Ray lie in TEMPORARY, whose name is
short: they have at most 107 bytes.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prefpipe import engines
from prefpipe.config.generate import GenerateConfig
from prefpipe.errors import PrefpipeError, UsageError
from prefpipe.inference import pool_ray, ray_tasks, warm
from prefpipe.inference.inflight import Inflight
from prefpipe.stages import build_pairs
from prefpipe.stages.build_pairs import candidates
from prefpipe.stages.generate import stage as generate
from tests.inference import birds

ADDRESS = "127.0.0.1:6399"
START = (sys.executable, "-m", "tests.inference.patient_ray", "start", "--num-cpus=1", "--num-gpus=0",
         "--disable-usage-stats", "--object-store-memory=100000000")  # fmt: skip
HEAD = ("--head", "--include-dashboard=false", "--node-ip-address=127.0.0.1", "--port=6399")


def start_node(*options: str) -> int:
    """Start a node of the cluster. Returns the process id of its raylet."""
    before = raylets()
    subprocess.run(
        [*START, *options], check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    (raylet,) = raylets() - before
    return raylet


def start_cluster(temporary: str) -> int:
    """Start both nodes. Returns the process id of the second one's raylet: the driver joins the first one."""
    start_node(*HEAD, "--temp-dir", temporary)
    return start_node("--address", ADDRESS, "--node-ip-address=127.0.0.2")


def raylets() -> set[int]:
    """The raylets of this namespace."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return {pid for pid in pids if b"/raylet\0" in command_of(pid)}


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def committed(out: Path) -> bool:
    """Whether a run has committed a shard."""
    return any((out / "completions").glob("*.ok.json"))


def when_committed(out: Path, act: Any) -> threading.Thread:
    """Act as soon as a run has committed a shard."""

    def watch() -> None:
        while not committed(out):
            time.sleep(0.05)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def die_with_a_request_inside(out: Path) -> None:
    """Let this process end by kill -9 as soon as a run has committed a shard and another request enters an engine."""
    plain = Inflight.take

    def take(self: Inflight, key: str, *, alone: bool) -> None:
        plain(self, key, alone=alone)
        if committed(out):
            os.kill(os.getpid(), signal.SIGKILL)

    Inflight.take = take  # type: ignore[method-assign]


def run_tasks(folder: Path, cluster: str) -> dict[str, Any]:
    """What becomes of tasks, by name: results, or the error."""
    found: dict[str, Any] = {}

    def act(name: str, function: Any, *arguments: Any) -> None:
        try:
            found[name] = list(function(*arguments) or ())
        except PrefpipeError as error:
            found[name] = [type(error).__name__, error.message, error.hint]

    with ray_tasks.tasks(cluster, folder, dict) as run:
        act("doubled", run, birds.doubled, range(6), range(6), [folder / "begun"] * 6)
        act("odd", run, birds.odd, [1, 2])
        act("unseen", ray_tasks._compare_machines, folder / "nowhere", dict)
        act("others", ray_tasks._compare_machines, folder, birds.process)
        act("killed", run, birds.killed, [1])
    return found


def main() -> None:
    model, prompts, folder, temporary = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4]
    pool_ray.Cluster.start_s = 200.0
    config = GenerateConfig(
        model=model, prompts=prompts, engine="fake", num_samples=2, rewards=("short_sentence",), shard_rows=4,
    )  # fmt: skip
    with ThreadPoolExecutor(1) as beside:  # most of a start is waiting; the driver imports what it needs meanwhile
        nodes = beside.submit(start_cluster, temporary)
        generate.run(config, folder / "inline", force=False)
    second = nodes.result()
    config = config.model_copy(update={"workers": 2, "cluster": f"ray://{ADDRESS}"})
    began = time.monotonic()
    try:
        generate.run(config.model_copy(update={"workers": 3}), folder / "too_many", force=False)
    except UsageError as error:
        found = {"message": error.message, "seconds": time.monotonic() - began}
        (folder / "too_many.json").write_text(json.dumps(found))
    (folder / "tasks.json").write_text(json.dumps(run_tasks(folder, config.cluster)))
    candidates._ROWS_PER_PARTITION = 20
    build_pairs.run(birds.pairing(folder, config.cluster), folder / "pairs", force=False)
    engines.ENGINES["fake"] = "tests.faults.engines:slow"
    with warm.shelf() as shelf:
        shelf.keep = True  # the runs that follow need no other workers
        generate.run(config, folder / "whole", force=False)
        killing = when_committed(folder / "node_dies", lambda: os.kill(second, signal.SIGKILL))
        generate.run(config, folder / "node_dies", force=False)
        killing.join()
        die_with_a_request_inside(folder / "driver_dies")
        generate.run(config, folder / "driver_dies", force=False)


if __name__ == "__main__":
    main()
