"""The peak of this process and of those below it, as the kernel counts it."""

import mmap
import subprocess
import sys
from types import SimpleNamespace

import pytest

from prefpipe import memory

HOLD = "held = bytearray(b'1') * (256 << 20); print('held', flush=True); input()"


def peak() -> float:
    return memory.peaks()["peak_memory_gib"]


def test_memory_that_was_given_back_counts() -> None:
    before = peak()
    with mmap.mmap(-1, 192 << 20) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
    assert peak() >= max(before, 0.19)


def test_a_process_below_this_one_counts_while_it_runs() -> None:
    before = peak()
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=-1, stdout=-1, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        assert peak() - before > 0.25
        child.communicate("\n")
    assert peak() - before < 0.25


@pytest.mark.parametrize("process", ["0", "no-such-process"])
def test_a_process_that_has_ended_holds_nothing(process: str) -> None:
    assert memory.resident_peak(process) == 0
    assert list(memory._below(process)) == []


def test_what_torch_reserves_on_every_gpu_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "peak_gpu_memory_gib" not in memory.peaks()
    of_device = {0: 3 << 30, 1: 1 << 29}
    cuda = SimpleNamespace(
        is_initialized=lambda: True, device_count=lambda: 2, max_memory_reserved=of_device.__getitem__
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert memory.peaks()["peak_gpu_memory_gib"] == 3.5
