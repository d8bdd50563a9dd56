"""Which number type the hardware is fast at, by what it says of itself."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefpipe import machine


@pytest.fixture(autouse=True)
def unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine without GPUs that says nothing of its CPU."""
    for name in ("_CPUINFO", "_NVIDIA", "_AMD"):
        monkeypatch.setattr(machine, name, tmp_path / name)
    machine.number_type.cache_clear()
    yield
    machine.number_type.cache_clear()


@pytest.mark.parametrize(
    ("lines", "dtype"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", "bfloat16"),
        ("flags\t\t: fpu avx2 amx_bf16 amx_tile\n", "bfloat16"),
        ("flags\t\t: fpu avx2 avx512f avx512bw\n", "float32"),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n", "bfloat16"),
        ("processor\t: 0\nFeatures\t: fp asimd\n", "float32"),
        ("model name\t: a bf16 machine\n", "float32"),
        ("", "float32"),
    ],
)
def test_a_cpu_computes_what_its_flags_say(tmp_path: Path, lines: str, dtype: str) -> None:
    (tmp_path / "_CPUINFO").write_text(lines)
    assert machine.number_type()[0] == dtype


def test_a_machine_that_says_nothing_computes_float32() -> None:
    assert machine.number_type()[0] == "float32"


@pytest.mark.parametrize(
    ("said", "dtype"),
    [("9.0\n9.0\n", "bfloat16"), ("8.0\n7.5\n", "float32"), ("", "bfloat16"), ("[N/A]\n", "bfloat16")],
)
def test_the_oldest_gpu_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, dtype: str) -> None:
    (tmp_path / "_NVIDIA").touch()
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, said, ""))
    assert machine.number_type()[0] == dtype


def test_a_gpu_whose_tool_is_not_there_is_taken_for_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_NVIDIA").touch()
    monkeypatch.setattr(machine, "_NVIDIA_SMI", (str(tmp_path / "nowhere"),))
    assert machine.number_type()[0] == "bfloat16"


def test_a_gpu_of_amd_computes_bfloat16(tmp_path: Path) -> None:
    (tmp_path / "_AMD").touch()
    assert machine.number_type()[0] == "bfloat16"


def test_available_memory_is_a_plausible_number_of_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert 10**7 < machine.available_memory() < 10**14
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "absent")
    assert 10**7 < machine.available_memory() < 10**14


def test_visible_gpus_are_those_that_the_environment_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for text, expected in (("2,3", ("2", "3")), ("", ()), ("-1", ()), ("0,-1,2", ("0",)), ("MIG-a", ("MIG-a",))):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
        assert machine.visible_gpus() == expected
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(machine, "_DEV", tmp_path)
    for name in ("nvidia0", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert machine.visible_gpus() == ("0", "1")


def test_free_memory_is_less_where_a_container_has_a_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    5000 kB\n")
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "meminfo")
    for text, expected in (("max\n", 5000 << 10), ("4096\n", 4096)):
        (tmp_path / "limit").write_text(text)
        monkeypatch.setattr(machine, "_CGROUP", tmp_path / "limit")
        assert machine.available_memory() == expected


@pytest.mark.parametrize("name", ["_NVIDIA", "_AMD"])
def test_a_gpu_is_seen_by_its_device_unless_it_is_hidden(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.on_cpu()
    (tmp_path / name).touch()
    assert not machine.on_cpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert not machine.on_cpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.on_cpu()


def test_auto_is_the_number_type_of_the_machine_and_a_name_is_kept() -> None:
    assert [machine.named(dtype) for dtype in ("auto", "bfloat16", "float16")] == ["float32", "bfloat16", "float16"]
