"""Tensors that FSDP2 cuts by rows over the ranks, and which rows of them this rank has."""

import torch
from torch.distributed.tensor import DTensor, Shard

from prefpipe.forward.tensor_files import Stored


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
