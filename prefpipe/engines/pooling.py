# pyright: basic
# vLLM ships incomplete types.
"""Sequence classification in vLLM: token ids in, raw logits out."""

import contextlib
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from prefpipe.engines import vllm_process

Classify = Callable[[Sequence[Sequence[int]]], list[list[float]]]
_KV_CACHE_MIB = 512  # on CPU; a GPU takes its free memory


@contextlib.contextmanager
def classifier(directory: Path, dtype: str, max_length: int, gpu_memory_utilization: float) -> Generator[Classify]:
    """A function from rows of token ids to their logits, one list per row; leaving the `with` block frees the model.

    `use_activation=False`: vLLM would squash the logits by default, and good answers would tie at 1.
    """
    vllm_process.prepare()
    import vllm

    with vllm_process.starting():
        llm = vllm.LLM(
            model=str(directory),
            runner="pooling",
            dtype=dtype,  # pyright: ignore[reportArgumentType]  (checked by the config)
            max_model_len=max_length,
            load_format="safetensors",
            trust_remote_code=False,
            seed=0,
            **vllm_process.device_options(_KV_CACHE_MIB, gpu_memory_utilization),
        )
    raw = vllm.PoolingParams(use_activation=False)

    def classify(rows: Sequence[Sequence[int]]) -> list[list[float]]:
        prompts: Any = [{"prompt_token_ids": list(row)} for row in rows]
        outputs = llm.encode(prompts, pooling_params=raw, pooling_task="classify", use_tqdm=False)
        return [output.outputs.data.float().tolist() for output in outputs]

    try:
        yield classify
    finally:
        with vllm_process.quiet():
            llm.llm_engine.engine_core.shutdown()
            vllm_process.free()
