"""What a step costs in memory and time, measured on a probe: the basis of the token budget and of `prefpipe plan`.

Activations are what autograd keeps for backward; a hook counts their storages exactly, on any device, so no table of
architectures is needed. They grow linearly with the tokens of a micro-batch.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from prefpipe import fsio
from prefpipe.forward.head import CHUNK
from prefpipe.forward.layout import Tree
from prefpipe.forward.logps import TreeModel, causal_model

_PROBE_TOKENS = 256
_SHARE = 0.8  # of the free memory that a step may use; the rest is for fragmentation and what else runs
_SMALLEST = 256
_LARGEST = {"cuda": 32768, "cpu": 768}  # on CPU more is not faster (docs/LOG.md), it only takes memory


@dataclass(frozen=True)
class Footprint:
    """Bytes: weights of the model, adapter with gradients, optimizer (masters, moments, their gradients), the head's
    largest chunk, fixed and per-token activations. Seconds per token: forward + backward, and forward alone."""

    weights: int
    adapter: int
    optimizer: int
    head: int
    activations_fixed: float
    activations_per_token: float
    train_seconds_per_token: float
    score_seconds_per_token: float

    def activations(self, tokens: int) -> float:
        """Bytes kept for backward by a micro-batch."""
        return self.activations_fixed + self.activations_per_token * tokens

    def peak(self, tokens: int) -> float:
        """Bytes at the highest point of a step whose micro-batches hold `tokens` tokens."""
        return self.weights + self.adapter + self.optimizer + self.head + self.activations(tokens)


def measure(model: TreeModel, trees: Sequence[Tree]) -> Footprint:
    """Run a small and a twice as large probe made of the data's own trees, forward and backward; leaves no gradient."""
    small, large = _take(trees, _PROBE_TOKENS), _take(trees, 2 * _PROBE_TOKENS)
    bytes_small, _ = _kept(model, small)
    bytes_large, train_seconds = _kept(model, large)
    tokens_small, tokens_large = (sum(t.num_tokens for t in probe) for probe in (small, large))
    slope = max(0.0, (bytes_large - bytes_small) / max(1, tokens_large - tokens_small))
    if tokens_large == tokens_small:
        slope = bytes_large / tokens_large
    start = fsio.monotonic()
    with torch.no_grad():
        model(model.layout(large))
    score_seconds = fsio.monotonic() - start
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    trainable = [p for p in model.parameters() if p.requires_grad]
    vocabulary = cast(torch.nn.Linear, causal_model(model.policy).get_output_embeddings()).weight.shape[0]
    return Footprint(
        weights=frozen,
        adapter=2 * sum(p.nbytes for p in trainable),
        optimizer=16 * sum(p.numel() for p in trainable),
        head=3 * 4 * CHUNK * vocabulary,
        activations_fixed=max(0.0, bytes_large - slope * tokens_large),
        activations_per_token=slope,
        train_seconds_per_token=train_seconds / tokens_large,
        score_seconds_per_token=score_seconds / tokens_large,
    )


def budget(footprint: Footprint, device: torch.device, free_bytes: float, longest_tree: int) -> int:
    """Tokens of a micro-batch that fit into the free memory beside what is fixed; at least the longest tree."""
    left = _SHARE * free_bytes - footprint.optimizer - footprint.head - footprint.activations_fixed
    fitting = int(left / max(1.0, footprint.activations_per_token))
    return max(longest_tree, min(_LARGEST.get(device.type, 32768), max(_SMALLEST, fitting)))


def free_bytes(device: torch.device) -> float:
    """Memory that can still be had: the GPU's free memory, or what the kernel calls available."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(fsio.available_memory() or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _take(trees: Sequence[Tree], tokens: int) -> list[Tree]:
    taken: list[Tree] = []
    load = 0
    for number in range(len(trees) * 64):
        if load >= tokens:
            break
        tree = trees[number % len(trees)]
        taken.append(tree)
        load += tree.num_tokens
    return taken


def _kept(model: TreeModel, trees: Sequence[Tree]) -> tuple[int, float]:
    """Bytes that a forward pass keeps for backward (parameters and input aside), and seconds of both passes."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    layout = model.layout(trees)
    start = fsio.monotonic()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        total = model(layout).sum()
    bytes_kept = sum(kept.values())
    total.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return bytes_kept, fsio.monotonic() - start
