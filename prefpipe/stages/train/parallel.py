"""One process or many: torch's DDP or FSDP2 under torchrun. Rank 0 leads: it alone writes files (`session`).

The micro-batches of a step are dealt out to the ranks. A rank that gets one fewer repeats one with weight zero: then
every rank makes the same number of forward and backward calls, and no collective call waits for one that never comes.
"""

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from prefpipe.forward.load import adapter_tensors, decoder_layers, model_tensors
from prefpipe.forward.logps import TreeModel, causal_model
from prefpipe.forward.lora_targets import may_skip_parameters

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this one is. A world of one needs no process group."""

    rank: int
    size: int

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def tell(self, value: T) -> T:
        """The value of rank 0, on every rank; a collective call."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in their order, on every rank; a collective call."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value)
        return box

    def deal(self, items: Sequence[T]) -> list[tuple[T, bool]]:
        """The items of this rank, and whether each counts: where items do not suffice, the first one fills up without
        counting. Equally many on every rank; `items` must not be empty."""
        share = [(item, True) for item in items[self.rank :: self.size]]
        rounds = -(-len(items) // self.size)
        return share + [(items[0], False)] * (rounds - len(share))


def start() -> World:
    """Join the process group that torchrun describes in the environment, or be alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return World(dist.get_rank(), size)


def stop(world: World) -> None:
    """Leave the process group."""
    if world.size > 1:
        gc.collect()  # FSDP2's modules hold the group in cycles; its threads must not live on to the interpreter's end
        dist.destroy_process_group()


def wrap(model: TreeModel, world: World, strategy: str) -> torch.nn.Module:
    """The model as the ranks share it: replicated (ddp), or with the parameters of every layer cut (fsdp2)."""
    if world.size == 1:
        return model
    if strategy == "ddp":
        # Buffers are constants. Experts that no token chose, and towers beside the text, get no gradient.
        skips = may_skip_parameters(causal_model(model.policy))
        return DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=skips)
    model.agree = lambda passes: max(world.gather(passes))
    for layer in decoder_layers(model.policy):
        fully_shard(layer)
    fully_shard(model)
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor gathered from its shards (a collective call), or itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_adapter(policy: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors, gathered where they are sharded; a collective call."""
    return {name: whole(tensor) for name, tensor in adapter_tensors(policy).items()}


def whole_model(policy: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All of the model's tensors, gathered where they are sharded; a collective call."""
    return {name: whole(tensor) for name, tensor in model_tensors(causal_model(policy)).items()}


def like(tensor: torch.Tensor, template: torch.Tensor) -> torch.Tensor:
    """A copy of a whole tensor that every rank holds, sharded and placed as `template` is."""
    if isinstance(template, DTensor):
        copy = tensor.to(template.device, copy=True)
        return distribute_tensor(copy, template.device_mesh, template.placements, src_data_rank=None)
    return tensor.to(template.device, copy=True)


def sum_over_ranks(values: dict[str, float], world: World) -> dict[str, float]:
    """Sums over all ranks by key, on every rank; a collective call. A rank without values has no keys."""
    if world.size == 1:
        return values
    shares = [share for share in world.gather(values) if share]
    return {key: sum(share[key] for share in shares) for key in shares[0]}
