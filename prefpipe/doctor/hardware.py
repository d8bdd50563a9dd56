"""What this machine has: torch on its processors, memory, disk, and the way to the hub."""

import os
import shutil
import tempfile
from pathlib import Path

from prefpipe import extras, machine
from prefpipe.doctor import probes
from prefpipe.doctor.findings import Finding

HUB_SECONDS = 5.0
_GIB = 1 << 30
_LEAST_MEMORY, _LEAST_DISK = 4 * _GIB, 5 * _GIB  # of the demo, with its engine and its checkpoints
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
_SIZE = 64  # of the square matrices of ones whose product is looked at
_TORCH = f"""
import json, torch, warnings
warnings.simplefilter("ignore")
usable = torch.cuda.is_available()
device = "cuda" if usable else "cpu"
values = {{}}
for dtype in (torch.float32, torch.bfloat16):
    ones = torch.ones({_SIZE}, {_SIZE}, dtype=dtype, device=device)
    values[str(dtype).removeprefix("torch.")] = float((ones @ ones)[0, 0])
print(json.dumps({{
    "version": torch.__version__,
    "built_for_gpus": bool(torch.version.cuda or torch.version.hip),
    "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if usable else [],
    "memory": torch.cuda.get_device_properties(0).total_memory if usable else 0,
    "values": values,
}}))
"""
_HUB = """
import os, urllib.error, urllib.request
place = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
try:
    urllib.request.urlopen(urllib.request.Request(place, method="HEAD"), timeout={seconds})
except urllib.error.HTTPError:
    pass  # it answered
"""


def torch() -> list[Finding]:
    """What torch is, on which device it computes, and in which number type."""
    answer = probes.ask(_TORCH)
    if answer.error:
        if answer.error.startswith("ModuleNotFoundError") and "'torch'" in answer.error:
            return [Finding("torch", "absent", "not installed", extras.command("train"))]
        return [Finding("torch", "fail", f"it does not compute: {answer.error}", "pip install --force-reinstall torch")]
    facts = answer.value
    wrong = [dtype for dtype, value in facts["values"].items() if value != _SIZE]
    what = (
        f"{facts['version']}: it computes {'wrong values in ' if wrong else ''}{' and '.join(wrong or facts['values'])}"
    )
    number_type, why = machine.number_type()
    return [
        Finding("torch", "fail" if wrong else "ok", what, "pip install --force-reinstall torch" if wrong else ""),
        _gpu(facts),
        Finding("number type", "ok", f"{number_type}: {why}"),
    ]


def _gpu(facts: dict[str, object]) -> Finding:
    gpus = facts["gpus"]
    if isinstance(gpus, list) and gpus:
        return Finding("gpu", "ok", f"{len(gpus)} x {gpus[0]}, {int(str(facts['memory'])) / _GIB:.0f} GiB")
    if not machine.has_gpu():
        return Finding("gpu", "absent", "none on this machine: the CPU computes")
    if facts["built_for_gpus"]:
        return Finding(
            "gpu", "fail", "there is one, and torch cannot use it", "compare the driver in nvidia-smi with torch"
        )
    return Finding("gpu", "warn", "there is one, and this torch is built for CPUs", extras.command("train", "cuda"))


def memory() -> Finding:
    """Memory of the machine, or of the container that this process is in."""
    sizes = [int(line.split()[1]) << 10 for line in _text(_MEMINFO).splitlines() if line.startswith("MemTotal")]
    sizes += [int(limit) for limit in [_text(_CGROUP).strip()] if limit.isdigit()]
    total = min(sizes) if sizes else 0
    if not total:
        return Finding("memory", "warn", "the system does not say how much there is")
    cores = len(os.sched_getaffinity(0))
    what = f"{total / _GIB:.1f} GiB, {cores} CPU core{'s' if cores > 1 else ''}"
    if total < _LEAST_MEMORY:
        return Finding("memory", "warn", f"{what}: the demo needs 4 GiB", "use a larger machine, or a smaller model")
    return Finding("memory", "ok", what)


def disk(folder: Path, name: str) -> Finding:
    """Free space in a folder, or in the nearest one above it that exists, and whether it can be written to."""
    folder = folder.absolute()
    there = next(place for place in (folder, *folder.parents) if place.is_dir())
    try:
        with tempfile.NamedTemporaryFile(dir=there) as file:
            file.write(b"\0")
            file.flush()
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Finding(name, "fail", f"{folder}: {error.strerror}", "check its permissions and the disk")
    what = f"{free / _GIB:.1f} GiB free for {folder}"
    if free < _LEAST_DISK:
        return Finding(name, "warn", what, "free some: 5 GiB are enough for the demo")
    return Finding(name, "ok", what)


def hub(seconds: float = HUB_SECONDS) -> Finding:
    """Whether the hub answers. Models in a directory and the embedded one need no hub."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding(
            "hub", "warn", "HF_HUB_OFFLINE is set: only what is on this machine is read", "unset HF_HUB_OFFLINE"
        )
    answer = probes.ask(_HUB.format(seconds=seconds), seconds=2 * seconds)
    if answer.error:
        why = answer.error.rpartition(": ")[2][:120]
        what = f"it does not answer ({why}): names of models and datasets of the hub do not work"
        return Finding("hub", "warn", what, "use directories and files, or set HF_ENDPOINT to a mirror")
    return Finding("hub", "ok", "it answers")


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
