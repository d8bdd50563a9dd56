"""torch, memory, disk and the hub: what is there, what is broken, what does not answer."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from prefpipe import machine
from prefpipe.doctor import hardware
from tests.doctor.stand_ins import write
from tests.serving import nobody

TORCH = """
import types
float32, bfloat16 = "torch.float32", "torch.bfloat16"
__version__ = "9.9+cpu"
version = types.SimpleNamespace(cuda=CUDA, hip=None)
cuda = types.SimpleNamespace(is_available=lambda: GPUS > 0, device_count=lambda: GPUS,
    get_device_name=lambda i: "a GPU", get_device_properties=lambda i: types.SimpleNamespace(total_memory=80 << 30))
class Ones:
    def __init__(self, dtype): self.dtype = dtype
    def __matmul__(self, other): return {(0, 0): WRONG if self.dtype == bfloat16 else 64}
def ones(n, m, dtype, device): return Ones(dtype)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # files of one size within a second have one bytecode
    return tmp_path


def states(folder: Path, *, cuda: str = "None", gpus: int = 0, value: int = 64) -> dict[str, str]:
    text = TORCH.replace("CUDA", cuda).replace("GPUS", str(gpus)).replace("WRONG", str(value))
    write(folder, {"torch.py": text})
    return {finding.name: finding.state for finding in hardware.torch()}


def test_a_cpu_torch_on_a_machine_without_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    assert states(folder) == {"torch": "ok", "gpu": "absent", "number type": "ok"}


def test_a_gpu_that_torch_uses_cannot_use_or_is_not_built_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    assert states(folder, cuda="'13.0'", gpus=1)["gpu"] == "ok"
    assert states(folder, cuda="'13.0'")["gpu"] == "fail"
    assert states(folder)["gpu"] == "warn"


def test_wrong_numbers_are_a_broken_torch(folder: Path) -> None:
    assert states(folder, value=63)["torch"] == "fail"


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("raise ImportError('libcudart.so.13: cannot open shared object file')", "fail"),
        ("import os; os.abort()", "fail"),
        ("raise ModuleNotFoundError(\"No module named 'torch'\")", "absent"),
    ],
)
def test_a_torch_that_does_not_load(folder: Path, text: str, state: str) -> None:
    write(folder, {"torch.py": text})
    (found,) = hardware.torch()
    assert found.state == state
    assert found.do


def test_memory_is_the_smaller_of_machine_and_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_MEMINFO", write(tmp_path, {"meminfo": "MemTotal:  16777216 kB\n"}) / "meminfo")
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path / "limit")
    for limit, words, state in (("max\n", "16.0 GiB", "ok"), (f"{2 << 30}\n", "2.0 GiB", "warn"), ("", "16.0", "ok")):
        (tmp_path / "limit").write_text(limit)
        found = hardware.memory()
        assert (found.state, found.what.startswith(words)) == (state, True)
    monkeypatch.setattr(hardware, "_MEMINFO", tmp_path / "absent")
    assert hardware.memory().state == "warn"


def test_disk_is_that_of_the_nearest_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_LEAST_DISK", 1)
    assert hardware.disk(tmp_path / "not" / "yet", "disk").state == "ok"
    assert not (tmp_path / "not").exists()
    monkeypatch.setattr(hardware, "_LEAST_DISK", 1 << 70)
    assert hardware.disk(tmp_path, "disk").state == "warn"
    assert hardware.disk(Path("/proc/1/nothing"), "disk").state == "fail"


class Refuses(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(401)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def answering() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_hub_that_answers_is_there_whatever_it_says(answering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", answering)
    assert hardware.hub(30).state == "ok"


def test_a_hub_that_is_silent_gone_or_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert hardware.hub(0.3).state == "warn"
    with nobody() as port:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        assert hardware.hub(60).state == "warn"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in hardware.hub().what
