# pyright: basic
# vLLM ships incomplete types.
"""Sequence classification in vLLM: token ids in, raw logits out."""

import contextlib
import gc
import logging
import os
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from prefpipe.engines.vllm import (
    _ENVIRONMENT,  # one way to start vLLM quietly
    _cuda_is_available,  # one way to start vLLM quietly
    _quiet,  # one way to start vLLM quietly
)

Classify = Callable[[Sequence[Sequence[int]]], list[list[float]]]
_KV_CACHE_MIB = 512  # on CPU; a GPU takes its free memory


@contextlib.contextmanager
def classifier(directory: Path, dtype: str, max_length: int, gpu_memory_utilization: float) -> Generator[Classify]:
    """A function from rows of token ids to their logits, one list per row; leaving the `with` block frees the model.

    `use_activation=False`: vLLM would squash the logits by default, and good answers would tie at 1.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"gpu_memory_utilization": gpu_memory_utilization}
    if not _cuda_is_available():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        options = {"enforce_eager": True, "kv_cache_memory_bytes": _KV_CACHE_MIB << 20, "block_size": 32}
    logging.getLogger("vllm").setLevel(logging.ERROR)
    import vllm

    with _quiet():
        llm = vllm.LLM(
            model=str(directory),
            runner="pooling",
            dtype=dtype,  # pyright: ignore[reportArgumentType]  (checked by the config)
            max_model_len=max_length,
            load_format="safetensors",
            seed=0,
            **options,
        )
    raw = vllm.PoolingParams(use_activation=False)

    def classify(rows: Sequence[Sequence[int]]) -> list[list[float]]:
        prompts: Any = [{"prompt_token_ids": list(row)} for row in rows]
        outputs = llm.encode(prompts, pooling_params=raw, pooling_task="classify", use_tqdm=False)
        return [output.outputs.data.float().tolist() for output in outputs]

    try:
        yield classify
    finally:
        with _quiet():
            llm.llm_engine.engine_core.shutdown()
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()
            gc.collect()
