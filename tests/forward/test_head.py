"""The chunked log-prob head against log_softmax and autograd, and what it allocates."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prefpipe.forward.head import CHUNK, LogitRule, log_collisions, logit_rule, target_logps


def inputs(rows: int, vocabulary: int, dtype: torch.dtype, size: int = 16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, size, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, size, generator=generator).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden, weight, targets, torch.randn(rows, generator=generator)


RULES = {
    "plain": LogitRule(),
    "scale": LogitRule(scale=0.25),
    "cap": LogitRule(cap=3.0),
    "scale and cap": LogitRule(scale=0.5, cap=2.0),
}


def plain(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    rule: LogitRule = LogitRule(),
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias) * rule.scale
    logits = logits if rule.cap is None else rule.cap * torch.tanh(logits / rule.cap)
    logps = logits.log_softmax(dim=1)
    return logps.gather(1, targets.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rows", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_equals_log_softmax_in_value_and_gradient(rows: int, rule: str, biased: bool, trainable: bool):
    """d log p(y) / dh = W[y] - sum_v p_v W_v times the slope of the rule, whatever the loss above: here a random
    linear one. A trainable head gives the gradients of W and of the bias too."""
    hidden, weight, targets, slope = inputs(rows, 50, torch.float32)
    weight.requires_grad_(trainable)
    bias = torch.randn(50, generator=torch.Generator().manual_seed(9)).requires_grad_(trainable) if biased else None
    over = [hidden, weight, *([] if bias is None else [bias])] if trainable else [hidden]
    found = target_logps(hidden, weight, targets, RULES[rule], bias)
    gradients = torch.autograd.grad(found, over, slope)
    expected = plain(hidden, weight, targets, RULES[rule], bias)
    expected_gradients = torch.autograd.grad(expected, over, slope)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for mine, other in zip(gradients, expected_gradients, strict=True):
        assert other.norm() > 0
        assert (mine - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rows", [1, CHUNK + 1])
def test_collisions_are_the_log_of_summed_squares(rows: int, rule: str):
    hidden, weight, *_ = inputs(rows, 50, torch.float32)
    bias = torch.randn(50, generator=torch.Generator().manual_seed(9))
    logits = (hidden @ weight.T + bias) * RULES[rule].scale
    cap = RULES[rule].cap
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    found = log_collisions(hidden, weight, RULES[rule], bias)
    assert not found.requires_grad
    torch.testing.assert_close(found, logits.softmax(1).square().sum(1).log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_changes_the_values(rule: str):
    """The oracle above would agree with a head that ignores a rule only if the rule did nothing."""
    hidden, weight, targets, _ = inputs(40, 50, torch.float32)
    difference = target_logps(hidden, weight, targets, RULES[rule]) - plain(hidden, weight, targets)
    moved = float(difference.detach().abs().max())
    assert (moved > 0.5) == (rule != "plain")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_float64_inputs_give_the_float64_gradient_to_float32_accuracy(rule: str, trainable: bool):
    hidden, weight, targets, slope = inputs(40, 30, torch.float64)
    weight.requires_grad_(trainable)
    over = [hidden, weight] if trainable else [hidden]
    gradients = torch.autograd.grad(target_logps(hidden, weight, targets, RULES[rule]), over, slope)
    expected = torch.autograd.grad(plain(hidden, weight, targets, RULES[rule]), over, slope.double())
    for mine, other in zip(gradients, expected, strict=True):
        assert (mine - other).norm() <= 1e-6 * other.norm()


def test_a_trainable_head_that_also_embeds_gets_both_gradients():
    """Tied weights: d/dW through the hidden states and through the head add up."""
    _, weight, targets, slope = inputs(30, 50, torch.float32)
    weight.requires_grad_()
    found, expected = (head(weight[targets.flip(0)], weight, targets) for head in (target_logps, plain))
    (mine,), (other,) = (torch.autograd.grad(values, weight, slope) for values in (found, expected))
    assert (mine - other).norm() <= 1e-5 * other.norm()


def test_a_bfloat16_trainable_head_gathers_its_gradient_in_float32():
    """1,000 rows of slope 2^-9 of what the first row gives: bf16 sums would lose them all, fp32 keeps their sum."""
    rows = 4 * CHUNK
    hidden = torch.ones(rows, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    slope = torch.full((rows,), 2.0**-9)
    slope[0] = 1.0
    found = target_logps(hidden, weight, torch.zeros(rows, dtype=torch.long))
    (gradient,) = torch.autograd.grad(found, weight, slope)
    assert gradient.dtype == torch.bfloat16
    exact = 0.5 * (1 + (rows - 1) * 2.0**-9)
    assert gradient.flatten().tolist() == pytest.approx([exact, -exact], rel=2**-8)


def test_a_trainable_head_without_gradient_computes_values_only():
    hidden, weight, targets, _ = inputs(10, 20, torch.float32)
    with torch.no_grad():
        found = target_logps(hidden, weight.requires_grad_(), targets)
    assert not found.requires_grad
    torch.testing.assert_close(found, plain(hidden, weight, targets).detach(), rtol=1e-5, atol=1e-6)


def test_the_rule_of_a_family_is_read_from_its_config():
    """Some multiply, some divide, some cap; a missing, None or absent name is no rule."""
    rule = lambda **names: logit_rule(SimpleNamespace(**names))  # noqa: E731
    assert rule() == rule(logit_scale=None, logits_scaling=None, final_logit_softcapping=None) == LogitRule()
    assert rule(logit_scale=0.0625) == LogitRule(0.0625)
    assert rule(logits_scaling=8.0) == LogitRule(0.125)
    assert rule(lm_head_multiplier=0.5, logit_scale=4.0) == LogitRule(2.0)
    assert rule(logits_scaling=8.0, model_type="granite") == LogitRule(0.125)
    assert rule(logits_scaling=8.0, model_type="hyperclovax") == LogitRule(8.0)
    assert rule(final_logit_softcapping=30.0) == LogitRule(1.0, 30.0)
    assert rule(final_logit_softcapping=20.0, output_multiplier=0.5) == LogitRule(0.5, 20.0)
    assert rule(logits_soft_cap=30.0) == rule(output_logit_soft_cap=30.0) == LogitRule(1.0, 30.0)


def test_bfloat16_log_probs_are_float32_of_bfloat16_logits():
    """The only 16-bit step is the matrix product: values equal fp32 softmax of those logits, not a bf16 softmax."""
    hidden, weight, targets, _ = inputs(20, 50, torch.bfloat16)
    logits = (hidden @ weight.T).float()
    expected = logits.log_softmax(dim=1).gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(target_logps(hidden, weight, targets), expected, rtol=1e-5, atol=1e-6)


def test_large_logits_stay_finite():
    """Logits of +-1e4 overflow exp; log p is 0 for the winner and -2e4 for the loser, with zero and finite slopes."""
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[1e4], [-1e4]])
    found = target_logps(hidden, weight, torch.tensor([0, 1]))
    found.sum().backward()
    assert found.tolist() == [0.0, -2e4]
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == [0.0, -2e4]


def test_a_shift_of_all_logits_changes_nothing():
    hidden, weight, targets, _ = inputs(30, 20, torch.float32)
    shift = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(1))
    moved = target_logps(hidden, weight + shift, targets)
    torch.testing.assert_close(moved, target_logps(hidden, weight, targets), rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """Records the largest number of elements in a result of any operation."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_never_makes_a_tensor_of_all_rows_times_vocabulary(trainable: bool, rule: str):
    """N = 4 chunks: the largest tensor of forward and backward is one chunk of logits, CHUNK x V, not N x V.

    The gradient of a trainable head, V x H, is smaller here.
    """
    vocabulary, rows = 300, 4 * CHUNK
    hidden, weight, targets, slope = inputs(rows, vocabulary, torch.float32)
    weight.requires_grad_(trainable)
    over = [hidden, weight] if trainable else [hidden]
    with Largest() as seen:
        torch.autograd.grad(target_logps(hidden, weight, targets, RULES[rule]), over, slope)
    assert seen.numel == CHUNK * vocabulary
    with Largest() as seen:
        plain(hidden, weight, targets)
    assert seen.numel == rows * vocabulary  # the probe does see what a plain head makes


def test_without_gradient_no_slopes_are_kept():
    hidden, weight, targets, _ = inputs(10, 20, torch.float32)
    found = target_logps(hidden.detach(), weight, targets)
    assert not found.requires_grad
    torch.testing.assert_close(found, plain(hidden, weight, targets).detach(), rtol=1e-5, atol=1e-6)
