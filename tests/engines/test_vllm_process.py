"""What every use of vLLM shares, without starting it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prefpipe.engines import vllm_process


def test_the_environment_leaves_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"VLLM_LOGGING_LEVEL": "DEBUG"}
    monkeypatch.setattr(os, "environ", environment)
    vllm_process.prepare()
    assert environment["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert environment["VLLM_NO_USAGE_STATS"] == "1"


@pytest.mark.parametrize(
    ("on_gpu", "options"),
    [
        (True, {"gpu_memory_utilization": 0.5}),
        (False, {"enforce_eager": True, "kv_cache_memory_bytes": 3 * 2**20, "block_size": 32}),
    ],
)
def test_the_device_decides_what_bounds_the_cache(
    on_gpu: bool, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    assert vllm_process.device_options(3, 0.5) == options


@pytest.mark.parametrize("kept", [None, "0"])
def test_a_worker_takes_no_file_of_the_current_folder_for_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str | None
) -> None:
    """As multiprocessing starts one; what is started later is as before."""
    (tmp_path / "secrets.py").write_text("print('mine')")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    if kept is not None:
        monkeypatch.setenv("PYTHONSAFEPATH", kept)

    def worker() -> str:
        command = [sys.executable, "-c", "import secrets; print(secrets.token_hex.__module__)"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout

    with vllm_process.starting():
        assert worker() == "secrets\n"
    assert os.environ.get("PYTHONSAFEPATH") == kept
    if kept is None:
        assert worker() == "mine\n"


QUIET = """
import os
from prefpipe.engines.vllm_process import quiet
try:
    with quiet():
        os.write(1, b"from C++ to stdout ")
        os.write(2, b"from C++ to stderr ")
        raise ValueError
except ValueError:
    os.write(1, b"out")
    os.write(2, b"err")
"""


def test_quiet_covers_what_does_not_pass_through_python_and_ends_with_an_error() -> None:
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("out", "err")
