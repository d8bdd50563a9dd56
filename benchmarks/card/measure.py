"""Seconds and bytes of a piece of work on a card (or on a CPU), and the operations that it is made of."""

import time
from collections.abc import Callable
from statistics import median

import torch
from transformers import PreTrainedConfig

from prefpipe.forward.layout import Span
from prefpipe.memory import resident_peak
from prefpipe.stages.train import process_memory


def synchronize(device: torch.device) -> None:
    """Wait until the card has done all that it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long a piece of work takes, until the card is done with it."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def typical(work: Callable[[], object], device: torch.device, times: int = 3) -> float:
    """The median seconds of several passes, after one that does not count."""
    work()
    return median(seconds(work, device) for _ in range(times))


def peak(work: Callable[[], object], device: torch.device) -> float:
    """Bytes in use at the highest point of a piece of work, with what was there before: of the card's memory, or of
    the process."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return float(torch.cuda.max_memory_allocated(device))
    process_memory.restart_resident_peak()
    work()
    return float(resident_peak())


def body_operations(config: PreTrainedConfig) -> float:
    """Operations of the matrices of all layers for a token, forward: two for each weight."""
    size = config.head_dim or config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads + config.num_key_value_heads
    layer = 2 * config.hidden_size * size * heads + 3 * config.hidden_size * config.intermediate_size
    return 2.0 * layer * config.num_hidden_layers


def operations(config: PreTrainedConfig, spans: list[Span], scored: int, *, training: bool) -> float:
    """Operations of a row: matrices of the layers, attention over what each token sees, and the head for `scored`
    predictions. Training a LoRA adapter takes the gradient of activations alone, the adapter itself is left out."""
    size = config.head_dim or config.hidden_size // config.num_attention_heads
    tokens = sum(s.trunk_length + sum(n for _, n in s.completions) for s in spans)
    seen = sum(
        s.trunk_length * (s.trunk_length + 1) / 2 + sum(n * s.trunk_length + n * (n + 1) / 2 for _, n in s.completions)
        for s in spans
    )
    attention = 4.0 * seen * config.num_attention_heads * size * config.num_hidden_layers
    head = 2.0 * config.vocab_size * config.hidden_size * scored
    if training:
        return 2 * body_operations(config) * tokens + 3 * attention + 2 * head
    return body_operations(config) * tokens + attention + head
