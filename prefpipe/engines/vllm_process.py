# pyright: basic
# vLLM ships incomplete types.
"""vLLM in this process, whatever it computes: its environment before it is imported, a quiet start, and its end."""

import contextlib
import gc
import logging
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

# Read by vLLM when it is imported. As one process it leaves no children when it is killed, and it starts in a quarter
# of the time.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CONFIGURE_LOGGING": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_SAFE_PATH = "PYTHONSAFEPATH"


def cuda_is_available() -> bool:
    """Whether vLLM will run on a GPU."""
    import torch

    return torch.cuda.is_available()


def prepare() -> None:
    """Set the environment for `import vllm`; a variable that is set already keeps its value."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not cuda_is_available():
        # It runs eagerly anyway: without this the first request with log-probs compiles a C++ kernel for two seconds.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    logging.getLogger("vllm").setLevel(logging.ERROR)
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # no Triton on CPU, and none is needed


def device_options(kv_cache_mib: int, gpu_memory_utilization: float) -> dict[str, Any]:
    """Options of `vllm.LLM` for the device: on CPU the size of the cache, on a GPU the share of the memory."""
    if cuda_is_available():
        return {"gpu_memory_utilization": gpu_memory_utilization}
    return {"enforce_eager": True, "kv_cache_memory_bytes": kv_cache_mib << 20, "block_size": 32}


def free() -> None:
    """Leave vLLM's process group and free the memory of engines that were shut down and that nothing refers to."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    gc.collect()


@contextlib.contextmanager
def starting() -> Generator[None]:
    """Start vLLM in here: quietly, and so that the workers that it starts take no file of the current folder for a
    module of Python or of a package. Programs that are started later do as they are used to."""
    kept = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        with quiet():
            yield
    finally:
        del os.environ[_SAFE_PATH]
        if kept is not None:
            os.environ[_SAFE_PATH] = kept


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Send stdout and stderr nowhere: start-up and shutdown of vLLM print over the progress bar, partly from C++."""
    with Path(os.devnull).open("w") as nowhere:
        kept = [(stream, os.dup(stream)) for stream in (1, 2)]
        try:
            for stream, _ in kept:
                os.dup2(nowhere.fileno(), stream)
            yield
        finally:
            for stream, copy in kept:
                os.dup2(copy, stream)
                os.close(copy)
