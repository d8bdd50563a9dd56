"""The chunked log-prob head against log_softmax and autograd, and what it allocates."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prefpipe.forward.head import CHUNK, frozen_head_logps


def inputs(rows: int, vocabulary: int, dtype: torch.dtype, size: int = 16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, size, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, size, generator=generator).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden, weight, targets, torch.randn(rows, generator=generator)


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logps = (hidden @ weight.T).log_softmax(dim=1)
    return logps.gather(1, targets.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("rows", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_equals_log_softmax_in_value_and_gradient(rows: int):
    """d log p(y) / dh = W[y] - sum_v p_v W_v, whatever the loss above: here a random linear one."""
    hidden, weight, targets, slope = inputs(rows, 50, torch.float32)
    found = frozen_head_logps(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(found, hidden, slope)
    expected = plain(hidden, weight, targets)
    (expected_gradient,) = torch.autograd.grad(expected, hidden, slope)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()


def test_float64_inputs_give_the_float64_gradient_to_float32_accuracy():
    hidden, weight, targets, slope = inputs(40, 30, torch.float64)
    (gradient,) = torch.autograd.grad(frozen_head_logps(hidden, weight, targets), hidden, slope)
    (expected,) = torch.autograd.grad(plain(hidden, weight, targets), hidden, slope.double())
    assert (gradient - expected).norm() <= 1e-6 * expected.norm()


def test_bfloat16_log_probs_are_float32_of_bfloat16_logits():
    """The only 16-bit step is the matrix product: values equal fp32 softmax of those logits, not a bf16 softmax."""
    hidden, weight, targets, _ = inputs(20, 50, torch.bfloat16)
    logits = (hidden @ weight.T).float()
    expected = logits.log_softmax(dim=1).gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(frozen_head_logps(hidden, weight, targets), expected, rtol=1e-5, atol=1e-6)


def test_large_logits_stay_finite():
    """Logits of +-1e4 overflow exp; log p is 0 for the winner and -2e4 for the loser, with zero and finite slopes."""
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[1e4], [-1e4]])
    found = frozen_head_logps(hidden, weight, torch.tensor([0, 1]))
    found.sum().backward()
    assert found.tolist() == [0.0, -2e4]
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == [0.0, -2e4]


def test_a_shift_of_all_logits_changes_nothing():
    hidden, weight, targets, _ = inputs(30, 20, torch.float32)
    shift = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(1))
    moved = frozen_head_logps(hidden, weight + shift, targets)
    torch.testing.assert_close(moved, frozen_head_logps(hidden, weight, targets), rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """Records the largest number of elements in a result of any operation."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_never_makes_a_tensor_of_all_rows_times_vocabulary():
    """N = 4 chunks: the largest tensor of forward and backward is one chunk of logits, CHUNK x V, not N x V."""
    vocabulary, rows = 300, 4 * CHUNK
    hidden, weight, targets, slope = inputs(rows, vocabulary, torch.float32)
    with Largest() as seen:
        torch.autograd.grad(frozen_head_logps(hidden, weight, targets), hidden, slope)
    assert seen.numel == CHUNK * vocabulary
    with Largest() as seen:
        plain(hidden, weight, targets)
    assert seen.numel == rows * vocabulary  # the probe does see what a plain head makes


def test_without_gradient_no_slopes_are_kept():
    hidden, weight, targets, _ = inputs(10, 20, torch.float32)
    found = frozen_head_logps(hidden.detach(), weight, targets)
    assert not found.requires_grad
    torch.testing.assert_close(found, plain(hidden, weight, targets).detach(), rtol=1e-5, atol=1e-6)
