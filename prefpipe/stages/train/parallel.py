"""One process or many: torch's DDP or FSDP2 under torchrun. Rank 0 leads: it alone writes files (`session`).

The micro-batches of a step are dealt out to the ranks. A rank that gets one fewer repeats one with weight zero: then
every rank makes the same number of forward and backward calls, and no collective call waits for one that never comes.
"""

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from prefpipe.errors import PrefpipeError
from prefpipe.forward import shards
from prefpipe.forward.load import adapter_tensors, decoder_layers
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

    def together(self, work: Callable[[], T]) -> T:
        """What `work` returns here, once all ranks have done theirs; where it fails on any of them, the first error is
        raised on all. A collective call."""
        results: list[T] = []
        self.shares(lambda: results.append(work()))
        return results[0]

    def shares(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns on every rank, in their order, on every rank; errors as in `together`. A collective
        call."""
        result, error = None, None
        try:
            result = work()
        except PrefpipeError as raised:
            error = raised
        gathered = self.gather((result, error))
        first = next((found for _, found in gathered if found is not None), None)
        if first is not None:
            raise first
        return [cast(T, share) for share, _ in gathered]

    def deal(self, items: Sequence[T]) -> list[tuple[T, bool]]:
        """The items of this rank, and whether each counts: where items do not suffice, the first one fills up without
        counting. Equally many on every rank; `items` must not be empty."""
        share = [(item, True) for item in items[self.rank :: self.size]]
        rounds = -(-len(items) // self.size)
        return share + [(items[0], False)] * (rounds - len(share))


ALONE = World(0, 1)


def start() -> World:
    """Join the process group that torchrun describes in the environment, or be alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return World(dist.get_rank(), size)


def stop(world: World) -> None:
    """Leave the process group."""
    if world.size > 1:
        gc.collect()  # FSDP2's modules hold the group in cycles; its threads must not live on to the interpreter's end
        dist.destroy_process_group()


def cuts(world: World, strategy: str) -> bool:
    """Whether the ranks cut the model (fsdp2) instead of each holding it."""
    return world.size > 1 and strategy == "fsdp2"


def cut(model: TreeModel, world: World, computes_in: torch.dtype) -> None:
    """Cut every parameter of a model without weights by rows over the ranks (FSDP2), and give this rank memory for its
    rows. Those of adapters, which are whole on the CPU, are kept; all others, and no buffers, are left to be read.

    Gradients are summed in float32. A forward pass without gradient leaves no layer gathered, or an optimizer would see
    parameters of two kinds.
    """
    model.agree = lambda passes: max(world.gather(passes))
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    adapters = _to_meta(model)
    policy = MixedPrecisionPolicy(param_dtype=computes_in, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in decoder_layers(model.policy):
        fully_shard(layer, mp_policy=policy)
    root = fully_shard(model, mp_policy=policy)
    if device.type == "cpu":
        _gather_late(root)
    buffers = [(module, list(module.named_buffers(recurse=False))) for module in model.modules()]
    model.to_empty(device=device)
    for module, own in buffers:
        for name, buffer in own:
            setattr(module, name, buffer.to(device))
    for name, parameter in model.named_parameters():
        if name in adapters:
            shards.fill(parameter, adapters[name])
    register_fsdp_forward_method(model, "plain")
    gathered = model.plain

    def plain(prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
        logps = gathered(prompt, completion)
        root.reshard()
        return logps

    model.plain = plain
    model.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else root.reshard())


def _gather_late(root: FSDPModule) -> None:
    """Have no layer gathered but the one that computes. FSDP2 fetches the next one ahead and keeps the buffer of the
    last one, which on a GPU hides the transfer; on a CPU the cores that compute do the transfer: it hides nothing."""
    for module in root.modules():  # pyright: ignore[reportAttributeAccessIssue]  (a mixin of Module)
        if isinstance(module, FSDPModule):
            module.set_modules_to_backward_prefetch([module])  # it is there already, and no other is fetched
    root._set_unshard_async_op(async_op=True)  # pyright: ignore[reportPrivateUsage]  (no public name)


def _to_meta(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Take the parameters that have memory out of a model; returns them by name."""
    found: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta:
                found[f"{prefix}.{name}"] = parameter.detach()
                empty = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
                setattr(module, name, empty)
    return found


def wrap(model: TreeModel, world: World, strategy: str) -> torch.nn.Module:
    """The model as the ranks share it: replicated (ddp), or as it was cut when it was loaded (fsdp2)."""
    if world.size == 1 or strategy == "fsdp2":
        return model
    # Buffers are constants. Experts that no token chose, and towers beside the text, get no gradient.
    skips = may_skip_parameters(causal_model(model.policy))
    return DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=skips)


def whole_adapter(policy: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors, gathered where they are sharded; a collective call."""
    return {name: shards.whole(tensor) for name, tensor in adapter_tensors(policy).items()}


def sum_over_ranks(values: dict[str, float], world: World) -> dict[str, float]:
    """Sums over all ranks by key, on every rank; a collective call. A rank without values has no keys."""
    if world.size == 1:
        return values
    shares = [share for share in world.gather(values) if share]
    return {key: sum(share[key] for share in shares) for key in shares[0]}
