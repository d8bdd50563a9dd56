"""What a forward and backward pass holds in memory, counted on torch's meta device: tensors there have shapes and no
bytes, so that a model of any size passes in seconds on any machine.

The code that runs is that of training on a GPU. Three things are replaced: SDPA, which on this device would be plain
products (its kernels keep queries, keys, values, mask, outputs, and the logarithm of a sum for each query), values
that the code reads, which nobody knows here and which count as 0, and autocast, which is off in training.
"""

import weakref
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefpipe.errors import UsageError
from prefpipe.forward import attention, load
from prefpipe.forward.architecture import reason
from prefpipe.forward.layout import Tree
from prefpipe.forward.logps import TreeModel, causal_model
from prefpipe.forward.weights import read_config, without_weights

_OF_A_KIND = 2  # layers of each kind in a pass; a third one tells what each further one adds


@dataclass(frozen=True)
class Held:
    """Bytes beside parameters, their gradients and buffers: kept for backward when the forward pass ends, and at the
    highest point of both passes."""

    kept: float
    peak: float


def described_model(directory: Path, dtype: str) -> PreTrainedModel:
    """The frozen model of a config.json on the meta device; files of weights are not read, and need not be there.

    Raises what `check_architecture` raises, and UsageError for values that no model can be built from.
    """
    attention.register()
    config = read_config(AutoModelForCausalLM, directory, weights=False)
    model = without_weights(config, directory, dtype, torch.device("meta"), "describes no model")
    model.requires_grad_(requires_grad=False)
    return model.eval()


def held(policy: torch.nn.Module, trees: Sequence[Tree], *, checkpointing: bool) -> Held:
    """What forward and backward of one micro-batch hold, for a model on the meta device. Layers of one kind hold alike:
    three of each pass, and the rest is counted by them.

    Raises UsageError for a model whose code does not run on this device.
    """
    model = TreeModel(policy)
    if attention.why_not_shared(causal_model(policy).config) or not _takes_trees(model):
        model.set_rows("separate")
    blocks = _blocks(policy)
    layers = list(blocks)
    kinds = [_kind(layer) for layer in layers]
    base = [n for n, kind in enumerate(kinds) if kinds[:n].count(kind) < _OF_A_KIND]
    more = {kind: count - _OF_A_KIND for kind, count in Counter(kinds).items() if count > _OF_A_KIND}
    with _gradients(policy), _checkpointed(policy, layers, on=checkpointing):
        try:
            if len(base) + len(more) * (len(base) + 1) < len(layers):
                return _by_layers(model, trees, blocks, kinds, base, more)
        except (RuntimeError, LookupError, TypeError, ValueError):
            pass  # a layer that asks for another one
        try:
            return _passes(model, trees)
        except (RuntimeError, NotImplementedError) as error:
            raise UsageError(
                f"a step of {type(causal_model(policy)).__name__} cannot be counted without weights: {reason(error)}",
                "plan it where the model can be loaded, without --gpus",
            ) from error


def _by_layers(
    model: TreeModel,
    trees: Sequence[Tree],
    blocks: torch.nn.ModuleList,
    kinds: Sequence[object],
    base: Sequence[int],
    more: dict[object, int],
) -> Held:
    """As `held`: passes of a few layers of each kind, and of one more of each."""

    def passes(numbers: Sequence[int]) -> Held:
        with _only(model, blocks, sorted(numbers)):
            return _passes(model, trees)

    first = passes(base)
    kept, peak = first.kept, first.peak
    for kind, count in more.items():
        third = next(n for n, other in enumerate(kinds) if other == kind and n not in base)
        with_third = passes([*base, third])
        kept += count * (with_third.kept - first.kept)
        peak += count * (with_third.peak - first.peak)
    return Held(kept, peak)


def _passes(model: TreeModel, trees: Sequence[Tree]) -> Held:
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    live = _Live(tensors)
    layout = model.layout(trees)
    with live, _Kernels(), _no_autocast():
        total = cast(torch.Tensor, model(layout)).sum()
        kept = live.bytes
        # torch.autograd.backward would leave the mode of `_Kernels`, and layers are computed again in backward.
        engine: Any = torch.autograd.Variable._execution_engine  # pyright: ignore[reportPrivateUsage]  (no public name)
        keep_graph = create_graph = False
        engine.run_backward(
            (total,), (torch.ones_like(total),), keep_graph, create_graph, (), allow_unreachable=True,
            accumulate_grad=True,
        )  # fmt: skip
    return Held(kept, live.peak)


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages on the meta device that operations make, from when they appear until nothing
    holds them. Those of `known` tensors do not count."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known = {_key(t): t for t in known}
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.zeros(1, dtype=args[0].dtype).item()
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self._count(tensor)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        key, storage = _key(tensor), tensor.untyped_storage()
        if key in self._known or key in self._seen:
            return
        size = storage.nbytes()

        def gone(_storage: Any) -> None:
            del self._seen[key]
            self.bytes -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def _key(tensor: torch.Tensor) -> int:
    """What tells a storage from all others: on the meta device every address is 0."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]  (no public name)


class _Kernels(TorchFunctionMode):
    """Kernels by their shapes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        of_experts = func is torch._grouped_mm  # pyright: ignore[reportPrivateUsage]  (no public name)
        if of_experts and args[0].dtype != torch.bfloat16:  # this device has it for that type only
            return args[0] @ args[1][0]
        if func is not scaled_dot_product_attention:
            return func(*args, **options)
        named = [options.get(name) for name in ("query", "key", "value", "attn_mask")[len(args) :]]
        return _Attention.apply(*args[:4], *named)


class _Attention(torch.autograd.Function):
    """Attention by its shapes: query [..., R, D], key [..., S, D], value [..., S, E] -> [..., R, E]."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, mask, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_gradients: torch.Tensor) -> Any:
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None


@contextmanager
def _no_autocast() -> Generator[None]:
    """torch.autocast does nothing on this device, which has no number type for it: peft turns it off around the product
    of an adapter on parameters, and torch would refuse."""
    autocast: Any = torch.autocast

    def of_device(device_type: str, *args: Any, **options: Any) -> Any:
        return nullcontext() if device_type == "meta" else autocast(device_type, *args, **options)

    torch.autocast = of_device  # pyright: ignore[reportAttributeAccessIssue]  (a class)
    try:
        yield
    finally:
        torch.autocast = autocast


def _takes_trees(model: TreeModel) -> bool:
    """Whether the model took tree attention; some have an attention of their own."""
    return causal_model(model.policy).config._attn_implementation == attention.NAME  # pyright: ignore[reportPrivateUsage]  (no public name)


def _blocks(policy: torch.nn.Module) -> torch.nn.ModuleList:
    layers = load.decoder_layers(policy)
    return next(m for m in policy.modules() if isinstance(m, torch.nn.ModuleList) and list(m) == layers)


def _kind(layer: torch.nn.Module) -> object:
    """What layers that hold alike have in common."""
    return tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())


@contextmanager
def _only(model: torch.nn.Module, blocks: torch.nn.ModuleList, numbers: Sequence[int]) -> Generator[None]:
    """The model with these of its layers."""
    places = [(m, name) for m in model.modules() for name, child in m.named_children() if child is blocks]
    few = torch.nn.ModuleList([blocks[n] for n in numbers])
    try:
        for module, name in places:
            setattr(module, name, few)
        yield
    finally:
        for module, name in places:
            setattr(module, name, blocks)


@contextmanager
def _gradients(policy: torch.nn.Module) -> Generator[None]:
    """Every trained parameter with its gradient, as the optimizer keeps it through all micro-batches."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        yield
    finally:
        for parameter in trained:
            parameter.grad = None


@contextmanager
def _checkpointed(policy: torch.nn.Module, layers: Sequence[torch.nn.Module], *, on: bool) -> Generator[None]:
    try:
        if on:
            load.checkpoint_layers(policy)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
