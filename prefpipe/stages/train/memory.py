"""What a step costs in memory and time, measured on a probe: the basis of the token budget and of `prefpipe plan`.

A probe runs forward and backward on the rows of the run, so that no table of architectures is needed. It measures two
numbers: the bytes that autograd keeps for backward, counted storage by storage, and the bytes that the allocator took
at the highest point. The second is what a step needs; on CPU glibc's heap makes it up to twice the first (docs/LOG.md).
The first is its lower bound, and takes its place where the system does not report the second. Both grow linearly with
the tokens of a micro-batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch

from prefpipe import clock, machine, memory
from prefpipe.forward import load
from prefpipe.forward.head import chunk_bytes
from prefpipe.forward.layout import Tree
from prefpipe.forward.logps import TreeModel, causal_model
from prefpipe.forward.shards import local
from prefpipe.stages.train import process_memory
from prefpipe.stages.train.examples import TrainRow
from prefpipe.stages.train.mapped import column
from prefpipe.stages.train.micro_batches import tree_of
from prefpipe.stages.train.record_batches import Batch

_PROBE_TOKENS = 256
_PASSES = 2  # the first shapes the heap as training will find it, the last is measured
SHARE = 0.8  # of the free memory that a step may use; the rest is for fragmentation and other processes
_SMALLEST = 256  # tokens of a budget
_LARGEST = {"cuda": 32768, "cpu": 768}  # on CPU more is not faster (docs/LOG.md), it only takes memory


@dataclass(frozen=True)
class Footprint:
    """The cost of a step in bytes, and of a token in seconds."""

    # The frozen weights; the trained ones with their gradients; the moments, and float32 masters with their
    # gradients where the weights are not float32.
    weights: int
    adapter: int
    optimizer: int
    # The largest chunk of logits.
    head: int
    # Activations, with what backward adds to them.
    activations_fixed: float
    activations_per_token: float
    # Forward and backward, and forward alone.
    train_seconds_per_token: float
    score_seconds_per_token: float

    def activations(self, tokens: int) -> float:
        """Bytes that forward and backward of a micro-batch take at their highest point, beside the head's chunk."""
        return self.activations_fixed + self.activations_per_token * tokens

    def peak(self, tokens: int) -> float:
        """Bytes at the highest point of a step whose micro-batches hold `tokens` tokens."""
        return self.weights + self.adapter + self.optimizer + self.head + self.activations(tokens)


@dataclass(frozen=True)
class Fitting:
    """How a run fits into the free memory."""

    # Tokens of a micro-batch.
    tokens: int
    # Whether backward computes activations again (gradient checkpointing).
    checkpointing: bool
    # What both were decided on: the cost of a step, and the tokens of the longest row.
    footprint: Footprint
    longest: int


def fitting(
    model: TreeModel,
    trees: Sequence[Tree],
    checkpointing: Literal["auto", "on", "off"],
    max_tokens: int,
    least: Callable[[int], int] = lambda number: number,
) -> Fitting:
    """Probe the model, with gradient checkpointing where it is on, or where the longest tree would not fit without it.

    `max_tokens` is the budget of the settings; 0 asks for the largest that fits. The model is left as it will train.
    `least` makes one decision of those of all ranks: the least of a number that each has.
    """
    longest = max(tree.num_tokens for tree in trees)
    device = next(model.parameters()).device
    checkpoint_if(model, on=checkpointing == "on")
    footprint, free = measure(model, trees), free_bytes(device)
    needed = checkpointing == "auto" and not least(fits(footprint, free, longest))
    if needed:
        checkpoint_if(model, on=True)
        footprint, free = measure(model, trees), free_bytes(device)
    tokens = max_tokens or least(budget(footprint, device, free, longest))
    return Fitting(tokens, needed or checkpointing == "on", footprint, longest)


def checkpoint_if(model: TreeModel, *, on: bool) -> None:
    """Turn gradient checkpointing on, if `on`; it cannot be turned off again."""
    if on:
        load.checkpoint_layers(model.policy)


def measure(model: TreeModel, trees: Sequence[Tree]) -> Footprint:
    """Run two probes made of the data's trees, the second twice as large, forward and backward: of trees longer than
    that, the one that both would be. Leaves no gradient."""
    trainable = [local(p) for p in model.parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in trainable)
    head = chunk_bytes(cast(torch.nn.Linear, causal_model(model.policy).get_output_embeddings()).weight)
    small, large = _take(trees, _PROBE_TOKENS), _take(trees, 2 * _PROBE_TOKENS)
    tokens_small, tokens_large = (sum(t.num_tokens for t in probe) for probe in (small, large))
    device = next(model.parameters()).device
    start = _held(device)
    probes = (small, large) if tokens_small < tokens_large else (large,)
    probed = [_probe(model, probe, start) for probe in probes]
    bytes_small, *_, bytes_large = (max(kept, taken - gradients - head) for kept, taken, _ in (probed[0], *probed))
    slope = max(0.0, (bytes_large - bytes_small) / max(1, tokens_large - tokens_small))
    if tokens_large == tokens_small:
        slope = bytes_large / tokens_large
    begin = clock.monotonic()
    with torch.no_grad():
        model(model.layout(large))
    score_seconds = clock.monotonic() - begin
    process_memory.return_free_memory()  # or the kernel would not count it as free when the budget is chosen
    return Footprint(
        weights=sum(local(p).nbytes for p in model.parameters() if not p.requires_grad),
        adapter=2 * gradients,
        # Two moments; of another dtype than float32 also a master and its gradient.
        optimizer=sum((8 if p.dtype == torch.float32 else 16) * p.numel() for p in trainable),
        head=head,
        activations_fixed=max(0.0, bytes_large - slope * tokens_large),
        activations_per_token=slope,
        train_seconds_per_token=probed[-1][2] / tokens_large,
        score_seconds_per_token=score_seconds / tokens_large,
    )


def budget(footprint: Footprint, device: torch.device, free_bytes: float, longest_tree: int) -> int:
    """Tokens of a micro-batch that fit into the free memory beside the fixed costs; never below the longest tree."""
    left = SHARE * free_bytes - footprint.optimizer - footprint.head - footprint.activations_fixed
    fitting = int(left / max(1.0, footprint.activations_per_token))
    return max(longest_tree, min(_LARGEST.get(device.type, 32768), max(_SMALLEST, fitting)))


def fits(footprint: Footprint, free_bytes: float, longest_tree: int) -> bool:
    """Whether a micro-batch of the longest tree alone fits into the free memory beside the fixed costs."""
    fixed = footprint.optimizer + footprint.head
    return fixed + footprint.activations(longest_tree) <= SHARE * free_bytes


def free_bytes(device: torch.device) -> float:
    """Bytes that can still be allocated: the GPU's free memory, or what the kernel calls available."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(machine.available_memory())


def probe_trees(rows: Sequence[TrainRow]) -> list[Tree]:
    """The trees of rows that a probe needs: the first ones, up to the tokens of the larger probe, and the longest."""
    tokens = column(rows, Batch.num_tokens)
    enough = int(np.searchsorted(np.cumsum(tokens), 2 * _PROBE_TOKENS)) + 1
    places = dict.fromkeys([*range(min(enough, len(rows))), int(tokens.argmax())])
    return [tree_of(rows[place]) for place in places]


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


def _probe(model: TreeModel, trees: Sequence[Tree], start: int) -> tuple[int, int, float]:
    """Of the last pass: bytes kept for backward, bytes above `start` at the highest point (0 where the system does not
    report it), seconds."""
    device = next(model.parameters()).device
    counted = _restart_peak(device)
    for _ in range(_PASSES - 1):
        _kept(model, trees)
    kept, seconds = _kept(model, trees)
    return kept, _peak(device) - start if counted else 0, seconds


def _held(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else process_memory.resident_memory()


def _restart_peak(device: torch.device) -> bool:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    return process_memory.restart_resident_peak()


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory.resident_peak()


def _kept(model: TreeModel, trees: Sequence[Tree]) -> tuple[int, float]:
    """Bytes that a forward pass keeps for backward, parameters aside, and seconds of both passes."""
    of_model = {local(p).untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_model:
            kept[storage.data_ptr()] = storage
        return tensor

    layout = model.layout(trees)
    start = clock.monotonic()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        total = model(layout).sum()
    # Layers that were gathered (FSDP2) have given their memory back by now, and an address may be taken again.
    bytes_kept = sum(storage.nbytes() for storage in kept.values())
    kept.clear()
    total.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return bytes_kept, clock.monotonic() - start
