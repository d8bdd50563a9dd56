"""How many workers a command starts, and what each of them gets of this machine."""

import os
from dataclasses import dataclass
from pathlib import Path

from prefpipe import machine
from prefpipe.errors import UsageError
from prefpipe.models.policy import Policy, weights_bytes

AUTO = "auto"
_AMD = Path("/dev/kfd")
_GIB = 1 << 30
_BESIDE = 2 * _GIB  # what a process with torch and an engine is reckoned to hold beside weights and cache
_FEWEST_SHARDS = 2  # on CPUs a worker for fewer is not worth the start of its engine


@dataclass(frozen=True)
class Size:
    """How many workers, where, and the GPUs for each. `cluster`: "" for this machine."""

    workers: int
    cluster: str = ""
    gpus_each: int = 0
    gpus: tuple[str, ...] = ()


def size_of(asked: int | str, cluster: str, engine: str, policy: Policy | None, needs: "Needs") -> Size:
    """The workers for some shards; `asked` is a number or "auto". Raises UsageError for more than the GPUs of this
    machine allow."""
    if engine == "fake" or policy is None:
        count = 1 if asked == AUTO else int(asked)
        return Size(count, cluster)
    if cluster:
        return Size(0 if asked == AUTO else int(asked), cluster, needs.tensor_parallel_size)
    gpus = machine.visible_gpus()
    if not gpus:
        return Size(_on_cpus(policy, needs) if asked == AUTO else int(asked))
    each = needs.tensor_parallel_size
    room = len(gpus) // each
    if asked != AUTO and int(asked) > max(room, 1):
        raise UsageError(
            f"workers = {asked} with tensor_parallel_size = {each} need {int(asked) * each} GPUs, and {len(gpus)} "
            "are visible",
            "ask for fewer, or --workers auto",
        )
    count = max(1, min(room, needs.shards)) if asked == AUTO else int(asked)
    return Size(count, gpus_each=each, gpus=gpus)


@dataclass(frozen=True)
class Needs:
    """What bounds the number of workers: shards that are to be made, GPUs for one engine, bytes of its cache on CPU,
    the number type of its weights, and whether the engines stay while other steps run, which need memory too (see
    `warm`)."""

    shards: int
    tensor_parallel_size: int
    cache_bytes: int
    dtype: str
    kept: bool = False


def environments(size: Size) -> list[dict[str, str]]:
    """The environment of each worker: its GPUs and its share of the cores. It is set before Python starts, since torch
    and OpenMP read it once."""
    threads = str(max(1, cores() // size.workers))
    shared = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        "RAYON_NUM_THREADS": os.environ.get("RAYON_NUM_THREADS", threads),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
        # vLLM would pin the threads of every worker to the same cores.
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
    }
    each = size.gpus_each
    own = [
        {"CUDA_VISIBLE_DEVICES": ",".join(size.gpus[i * each : (i + 1) * each])} if size.gpus else {}
        for i in range(size.workers)
    ]
    return [shared | gpus for gpus in own]


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _on_cpus(policy: Policy, needs: Needs) -> int:
    """One worker for each core, as many as memory and work allow."""
    if _AMD.exists():  # GPUs of AMD are not told apart here
        return 1
    weights = weights_bytes(policy.directory) * (2 if needs.dtype == "float32" else 1)
    each = weights + needs.cache_bytes + _BESIDE
    room = machine.available_memory() // (2 if needs.kept else 1)
    return max(1, min(cores(), room // each, needs.shards // _FEWEST_SHARDS))
