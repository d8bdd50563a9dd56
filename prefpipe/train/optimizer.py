"""AdamW on float32 master copies of low-precision weights, and the learning-rate schedule.

A bf16 weight has 8 bits of mantissa: an update of 1e-5 relative is rounded away. The masters take the updates and
gather the gradients of all micro-batches in float32; the model gets their rounded copies. Sharded parameters (FSDP2)
have sharded masters; `state` is always whole, so that a run may resume with another number of ranks.
"""

import math
from collections.abc import Mapping

import torch

from prefpipe.train.parallel import like, whole


class MasterAdamW:
    """AdamW (Loshchilov & Hutter 2019) over the trainable parameters of a model."""

    def __init__(self, model: torch.nn.Module, weight_decay: float) -> None:
        self._model = {_plain(n): p for n, p in model.named_parameters() if p.requires_grad}
        self._master = {n: p.detach().float().clone().requires_grad_() for n, p in self._model.items()}
        # Made now and kept: made during a step they would lie between its activations and fragment the heap.
        for master in self._master.values():
            master.grad = torch.zeros_like(master)
        self._adamw = torch.optim.AdamW(list(self._master.values()), lr=0.0, weight_decay=weight_decay, fused=True)

    def gather_gradients(self) -> None:
        """Add the gradients of one micro-batch to the masters' and clear them."""
        for name, parameter in self._model.items():
            if parameter.grad is None:
                continue
            self._gradient(name).add_(parameter.grad)
            parameter.grad = None

    def _gradient(self, name: str) -> torch.Tensor:
        gradient = self._master[name].grad
        assert gradient is not None
        return gradient

    def drop_gradients(self) -> None:
        """Forget the gradients of a step that is done again."""
        self._adamw.zero_grad(set_to_none=False)
        for parameter in self._model.values():
            parameter.grad = None

    def step(self, learning_rate: float, max_grad_norm: float) -> float:
        """Clip, update, copy back. Returns the gradient norm before clipping; when it is not finite nothing moves."""
        masters = list(self._master.values())
        norm = float(whole(torch.nn.utils.clip_grad_norm_(masters, max_grad_norm)))
        if math.isfinite(norm):
            for group in self._adamw.param_groups:
                group["lr"] = learning_rate
            self._adamw.step()
            with torch.no_grad():
                for name, parameter in self._model.items():
                    parameter.copy_(self._master[name])
        self._adamw.zero_grad(set_to_none=False)
        return norm

    def state(self) -> dict[str, torch.Tensor]:
        """Masters and moments as whole named tensors; a collective call when they are sharded."""
        tensors: dict[str, torch.Tensor] = {}
        for name, master in self._master.items():
            tensors[f"master/{name}"] = whole(master.detach())
            for key, value in self._adamw.state[master].items():
                tensors[f"{key}/{name}"] = whole(value)
        return tensors

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state` gave, and the model's weights with it."""
        with torch.no_grad():
            for name, master in self._master.items():
                master.copy_(like(tensors[f"master/{name}"], master))
                self._model[name].copy_(master)
                keys = [k.split("/", 1)[0] for k in tensors if k.split("/", 1)[1] == name]
                # In the given order on every rank: `state` gathers these one by one, in collective calls.
                # The fused kernel counts steps on the parameter's device.
                self._adamw.state[master] = {
                    key: value.to(master.device, copy=True) if key == "step" else like(value, master)
                    for key, value in ((key, tensors[f"{key}/{name}"]) for key in keys if key != "master")
                }


def learning_rate(step: int, num_steps: int, *, peak: float, warmup_ratio: float, schedule: str) -> float:
    """Rate of step 0..num_steps-1: a linear rise over the warmup, then constant, or linear or cosine towards zero."""
    warmup = warmup_steps(num_steps, warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    left = 1 - (step - warmup) / max(1, num_steps - warmup)
    return peak * left if schedule == "linear" else peak * 0.5 * (1 + math.cos(math.pi * (1 - left)))


def warmup_steps(num_steps: int, warmup_ratio: float) -> int:
    """Steps over which the learning rate rises."""
    return math.ceil(warmup_ratio * num_steps)


def _plain(name: str) -> str:
    """A parameter's name without DDP's prefix: checkpoints do not depend on how the model was shared."""
    return name.removeprefix("module.")
