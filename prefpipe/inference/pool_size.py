"""How many workers a command starts, and what each of them gets of this machine."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefpipe.errors import UsageError
from prefpipe.models.policy import Policy

AUTO = "auto"
_DEV, _AMD, _MEMINFO = Path("/dev"), Path("/dev/kfd"), Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup/memory.max")
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
    gpus = visible_gpus()
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
    the number type of its weights, and whether one engine in this process serves the next step too (see `warm`)."""

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


def visible_gpus() -> tuple[str, ...]:
    """The NVIDIA GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        gpus = [name.strip() for name in named.split(",")]
        return tuple(gpus[: next((i for i, name in enumerate(gpus) if name in ("", "-1")), len(gpus))])
    return tuple(str(i) for i in range(len([p for p in _DEV.glob("nvidia[0-9]*") if p.name[6:].isdigit()])))


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _on_cpus(policy: Policy, needs: Needs) -> int:
    """One worker for each core, as many as memory and work allow."""
    if _AMD.exists() or needs.kept:  # GPUs of AMD are not told apart here
        return 1
    files: Sequence[Path] = list(policy.directory.glob("*.safetensors"))
    weights = sum(file.stat().st_size for file in files) * (2 if needs.dtype == "float32" else 1)
    each = weights + needs.cache_bytes + _BESIDE
    return max(1, min(cores(), free_memory() // each, needs.shards // _FEWEST_SHARDS))


def free_memory() -> int:
    """Bytes that this process may still take."""
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) << 10
    limit = _CGROUP.read_text().strip() if _CGROUP.exists() else "max"
    return min(free, int(limit)) if limit.isdigit() else free
