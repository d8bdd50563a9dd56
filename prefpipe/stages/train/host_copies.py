"""Copies on the host of what a checkpoint holds, from which it is written while training goes on.

Tensors of a GPU are copied to pinned memory, which a GPU fills by itself: the copies queue up and are waited for once.
Pinning takes longer than copying, so that this memory is kept for the next checkpoint. Other copies are made anew.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from prefpipe import machine
from prefpipe.forward import shards
from prefpipe.forward.shards import Copied

# Of the memory of the host that is available, how much the copies of a node may take. On a CPU a step has up to 0.8 of
# it (`memory.SHARE`).
_SHARE_BESIDE_GPU, _SHARE_BESIDE_CPU = 1 / 2, 1 / 16

Tensors = Mapping[str, torch.Tensor]


def fit(nbytes: float, *, beside_gpu: bool, taken: float = 0) -> bool:
    """Whether copies of so many bytes on a node fit beside training, of whose memory so much is still to be `taken`."""
    share = _SHARE_BESIDE_GPU if beside_gpu else _SHARE_BESIDE_CPU
    return nbytes <= share * (machine.available_memory() - taken)


def pinned_bytes(nbytes: int) -> int:
    """What torch takes for a pinned tensor: the next power of two."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0


def _is_on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


def _pinned(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


def _wait() -> None:
    torch.cuda.current_stream().synchronize()


@dataclass(frozen=True)
class Pinning:
    """Which tensors have pinned copies, how their memory is made, and how copies that are under way are waited for."""

    applies: Callable[[torch.Tensor], bool] = _is_on_gpu
    memory: Callable[[torch.Tensor], torch.Tensor] = _pinned
    wait: Callable[[], None] = _wait


class HostCopies:
    """Makes the copies of one checkpoint after the other. Those before are overwritten where they are pinned."""

    def __init__(self, pinning: Pinning | None = None) -> None:
        self._pinning = pinning or Pinning()
        self._kept: dict[str, torch.Tensor] = {}

    def nbytes(self, tensors: Tensors, *, leads: bool) -> int:
        """Bytes of memory that copies of the `written_rows` of tensors need beside what is kept."""
        return sum(self._needed(name, shards.written_rows(tensor, leads=leads)[1]) for name, tensor in tensors.items())

    def take(self, tensors: Tensors, *, leads: bool) -> dict[str, Copied]:
        """Copies of the `written_rows` of tensors, which no later step changes."""
        copies: dict[str, Copied] = {}
        for name, tensor in tensors.items():
            first, rows = shards.written_rows(tensor, leads=leads)
            copies[name] = Copied(tensor.shape, first, self._copy(name, rows.detach()))
        if self._kept:
            self._pinning.wait()
        return copies

    def _needed(self, name: str, rows: torch.Tensor) -> int:
        if not self._pinning.applies(rows):
            return rows.nbytes
        return 0 if self._is_kept(name, rows) else pinned_bytes(rows.nbytes)

    def _copy(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        if not self._pinning.applies(rows):
            return rows.to("cpu", copy=True)
        if not self._is_kept(name, rows):
            self._kept[name] = self._pinning.memory(rows)
        return self._kept[name].copy_(rows, non_blocking=True)

    def _is_kept(self, name: str, rows: torch.Tensor) -> bool:
        kept = self._kept.get(name)
        return kept is not None and (kept.shape, kept.dtype) == (rows.shape, rows.dtype)
