"""An optimizer on float32 master copies of low-precision weights, and the learning-rate schedule.

A bf16 weight has 8 bits of mantissa, which round a relative update of 1e-5 away. The masters take the updates and
gather the gradients of all micro-batches in float32; the model gets rounded copies of them. A float32 weight is its
own master. Sharded parameters (FSDP2) have sharded masters, and so has their `state`.
"""

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from prefpipe import extras
from prefpipe.errors import MissingInputError
from prefpipe.forward.shards import fill, whole
from prefpipe.forward.tensor_files import Stored

_BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
}


class MasterOptimizer:
    """AdamW (Loshchilov & Hutter 2019) or RMSprop over the trainable parameters of a model.

    `optim` is a name of transformers.TrainingArguments. Raises MissingInputError when its package is not installed.
    """

    def __init__(self, model: torch.nn.Module, weight_decay: float, optim: str = "adamw_torch_fused") -> None:
        self._model = {_plain(n): p for n, p in model.named_parameters() if p.requires_grad}
        self._master = {n: _master(p) for n, p in self._model.items()}
        # Allocated once: during a step they would lie between its activations and fragment the heap.
        for master in self._master.values():
            master.grad = torch.zeros_like(master)
        self._optimizer = _make(optim, _groups(self._master, weight_decay))

    def gather_gradients(self) -> None:
        """Add the gradients of one micro-batch to those of the masters, and clear them."""
        for name, parameter in self._model.items():
            if parameter.grad is None or parameter is self._master[name]:
                continue
            self._gradient(name).add_(parameter.grad)
            parameter.grad = None

    def _gradient(self, name: str) -> torch.Tensor:
        gradient = self._master[name].grad
        assert gradient is not None
        return gradient

    def drop_gradients(self) -> None:
        """Clear the gradients of a step that is computed again or skipped."""
        self._optimizer.zero_grad(set_to_none=False)
        for name, parameter in self._model.items():
            if parameter is not self._master[name]:
                parameter.grad = None

    def step(self, learning_rate: float, max_grad_norm: float) -> float:
        """Clip the gradients, update the masters, copy them to the model. Returns the gradient norm before clipping;
        when it is not finite, no weight moves."""
        masters = list(self._master.values())
        norm = float(whole(torch.nn.utils.clip_grad_norm_(masters, max_grad_norm)))
        if math.isfinite(norm):
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
            with torch.no_grad():
                for name, parameter in self._model.items():
                    if parameter is not self._master[name]:
                        parameter.copy_(self._master[name])
        self._optimizer.zero_grad(set_to_none=False)
        return norm

    def state(self) -> dict[str, torch.Tensor]:
        """Masters and moments by name, none of them copied: sharded ones as their shards."""
        tensors: dict[str, torch.Tensor] = {}
        for name, master in self._master.items():
            tensors[f"master/{name}"] = master.detach()
            for key, value in self._optimizer.state[master].items():
                # bitsandbytes counts steps in plain integers.
                tensors[f"{key}/{name}"] = value if torch.is_tensor(value) else torch.tensor(value)
        return tensors

    def load_state(self, tensors: Mapping[str, torch.Tensor | Stored]) -> None:
        """Restore a `state`, and the weights of the model with it. Of tensors that are whole, in memory or in a file, a
        rank takes its rows."""
        with torch.no_grad():
            for name, master in self._master.items():
                fill(master, tensors[f"master/{name}"])
                if self._model[name] is not master:
                    self._model[name].copy_(master)
        self.load_moments(tensors)

    def load_moments(self, tensors: Mapping[str, torch.Tensor | Stored]) -> None:
        """Restore moments and step counts of a `state`, and leave the weights as they are."""
        for name, master in self._master.items():
            keys = [key for key, _, parameter in (k.partition("/") for k in tensors) if parameter == name]
            self._optimizer.state[master] = {
                key: _restored(tensors[f"{key}/{name}"], master) for key in keys if key != "master"
            }

    def misfits(self, tensors: Mapping[str, torch.Tensor | Stored]) -> list[str]:
        """In what a `state` is not one of these parameters: names and shapes, an example of each."""
        shapes = {name: list(master.shape) for name, master in self._master.items()}
        theirs = {n.partition("/")[2]: list(t.shape) for n, t in tensors.items() if n.startswith("master/")}
        lacking, more = sorted(shapes.keys() - theirs), sorted(theirs.keys() - shapes)
        other = [n for n in shapes if n in theirs and shapes[n] != theirs[n]]
        return [
            *([f"it has none of {len(lacking)} tensors such as {lacking[0]}"] if lacking else []),
            *([f"it has {len(more)} tensors more, such as {more[0]}"] if more else []),
            *(f"{n} is {theirs[n]} there and {shapes[n]} here" for n in other[:1]),
        ]


def _master(parameter: torch.Tensor) -> torch.Tensor:
    if parameter.dtype == torch.float32:
        return parameter
    return parameter.detach().float().requires_grad_()


def _groups(masters: Mapping[str, torch.Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with weight decay and those without: norms and biases, as in transformers' Trainer. A norm has one
    dimension; a bias may have two, one row for each expert."""
    free = {name for name, master in masters.items() if master.dim() < 2 or name.endswith("bias")}
    parts = [
        {"params": [m for n, m in masters.items() if (n in free) == undecayed], "weight_decay": decay}
        for undecayed, decay in ((False, weight_decay), (True, 0.0))
    ]
    return [part for part in parts if part["params"]]


def _make(optim: str, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    if optim == "adamw_torch_fused":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    if optim == "rmsprop":
        return torch.optim.RMSprop(groups, lr=0.0)
    try:
        bitsandbytes = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise MissingInputError(f"optim = {optim} needs the package bitsandbytes", extras.hint("bnb")) from error
    return getattr(bitsandbytes.optim, _BITSANDBYTES[optim])(groups, lr=0.0)


def _restored(value: torch.Tensor | Stored, master: torch.Tensor) -> Any:
    """An entry of the optimizer's state: a plain integer, a tensor of another shape, or one sharded as its master."""
    if tuple(value.shape) == tuple(master.shape):
        entry = torch.empty_like(master, dtype=value.dtype, requires_grad=False)
        fill(entry, value)
        return entry
    small = whole(value)
    if small.dim() == 0 and not small.is_floating_point():
        return int(small)
    return small.to(master.device, copy=True)  # step counts and tables; the fused kernel counts on its device


def learning_rate(
    step: int, num_steps: int, *, peak: float, warmup_ratio: float, schedule: str, warmup_steps: int = 0
) -> float:
    """The learning rate of a step from 0 to num_steps - 1: a linear rise over the w steps of the warmup, from
    peak / (w + 1) to the step before the peak, then constant, or a linear or cosine fall towards zero. (transformers
    begins at 0, and its first step changes nothing.)

    `warmup_steps` takes the place of `warmup_ratio` where it is not 0; the schedule "constant" has no warmup.
    """
    warmup = warmup_length(num_steps, warmup_ratio, warmup_steps, schedule)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule.startswith("constant"):
        return peak
    left = 1 - (step - warmup) / max(1, num_steps - warmup)
    return peak * left if schedule == "linear" else peak * 0.5 * (1 + math.cos(math.pi * (1 - left)))


def warmup_length(num_steps: int, warmup_ratio: float, warmup_steps: int, schedule: str) -> int:
    """Steps over which the learning rate rises."""
    return 0 if schedule == "constant" else warmup_steps or math.ceil(warmup_ratio * num_steps)


def _plain(name: str) -> str:
    """A parameter's name without the prefix of DDP: a checkpoint must not depend on how the ranks share the model."""
    return name.removeprefix("module.")
