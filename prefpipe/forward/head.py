"""Log-probs of target tokens from hidden states, chunk by chunk: never a [N, V] tensor.

N = completion tokens, H = hidden size, V = vocabulary. With a frozen head the gradient of log p(y) with respect to the
state h is u = W[y] - sum_v p_v W_v, whatever the loss; it is stored in the forward pass, so that backward is one
multiply and no matrix product is done twice.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

CHUNK = 256  # rows; [CHUNK, V] in fp32 is the largest tensor made here


def frozen_head_logps(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """hidden [N, H], weight [V, H] (no gradient), targets [N] -> float32 log-probs [N] in nats."""
    return _FrozenHead.apply(hidden, weight, targets)


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        needs_grad = hidden.requires_grad
        logps = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        slopes = torch.empty_like(hidden) if needs_grad else None
        for start in range(0, hidden.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            wanted = targets[rows].unsqueeze(1)
            logits = (hidden[rows] @ weight.T).float()
            log_total = logits.logsumexp(dim=1, keepdim=True)
            logps[rows] = (logits.gather(1, wanted) - log_total).squeeze(1)
            if slopes is not None:
                probabilities = logits.sub_(log_total).exp_()
                slopes[rows] = weight[targets[rows]] - probabilities.to(weight.dtype) @ weight
        ctx.save_for_backward(slopes)
        return logps

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (torch calls it by position)
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        (grad,) = grad_outputs
        return grad.unsqueeze(1).to(slopes.dtype) * slopes, None, None
