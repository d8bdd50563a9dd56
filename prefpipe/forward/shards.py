"""Tensors that FSDP2 cuts by rows over the ranks, and which rows of them this rank has."""

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Shard

from prefpipe.forward.tensor_files import Stored


def is_cut(tensor: torch.Tensor) -> bool:
    """Whether a tensor is cut over the ranks."""
    return isinstance(tensor, DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor on this rank; of one that is not cut, all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: torch.Tensor) -> tuple[int, torch.Tensor]:
    """The number of the first row on this rank, and the rows. Ranks get equally many, rounded up: the last ones may get
    fewer, or none."""
    if not isinstance(tensor, DTensor):
        return 0, tensor
    assert tensor.placements == (Shard(0),)
    each = -(-tensor.shape[0] // tensor.device_mesh.size())
    return min(tensor.device_mesh.get_local_rank() * each, tensor.shape[0]), tensor.to_local()


@dataclass(frozen=True)
class Copied:
    """A copy on the host of the rows of a tensor that this rank writes into a file, from row `first` on; the whole
    tensor has another `shape` where it is cut."""

    shape: torch.Size
    first: int
    rows: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensor."""
        return self.rows.dtype


def written_rows(tensor: torch.Tensor | Copied, *, leads: bool) -> tuple[int, torch.Tensor]:
    """The number of the first row that this rank writes into a file of all ranks, and the rows: those that it has of a
    tensor that is cut. Of another tensor rank 0 (`leads`) writes all rows, and the others none."""
    if isinstance(tensor, Copied):
        return tensor.first, tensor.rows
    first, rows = own_rows(tensor)
    return first, rows if leads or is_cut(tensor) else rows.new_empty(0)


@torch.no_grad()
def fill(target: torch.Tensor, source: torch.Tensor | Stored) -> None:
    """Copy into a tensor, or into the rows of it that this rank has: from a file, from a whole tensor, or from one that
    is cut alike."""
    if isinstance(source, DTensor):
        target.copy_(source)
        return
    first, rows = own_rows(target)
    if isinstance(source, Stored):
        source.read(first, rows)
    else:
        rows.copy_(source[first : first + len(rows)] if source.dim() else source)


def whole(tensor: torch.Tensor | Stored) -> torch.Tensor:
    """A tensor gathered from its shards (a collective call), read from its file, or itself."""
    if isinstance(tensor, Stored):
        return tensor.whole()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
