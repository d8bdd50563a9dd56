"""Master-weight AdamW against torch's own, in bf16, through bad gradients and saved state; schedules."""

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.trainer_pt_utils import get_parameter_names

from prefpipe.errors import MissingInputError
from prefpipe.forward import load
from prefpipe.stages.train.optimizer import MasterOptimizer, learning_rate

NO_CLIP = 1e9


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    model[0].bias.requires_grad_(False)
    return model.to(dtype)


def set_gradients(model: torch.nn.Module, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def by_decay(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Matrices, with the weight decay of the optimizer, and biases without it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dim() for p in trained} == {1, 2}
    return [{"params": [p for p in trained if p.dim() == 2]},
            {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0}]  # fmt: skip


@pytest.mark.parametrize("max_norm", [0.5, NO_CLIP])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_torch_adamw_in_float32(weight_decay: float, max_norm: float):
    ours, theirs = network(), network()
    optimizer = MasterOptimizer(ours, weight_decay)
    reference = torch.optim.AdamW(by_decay(theirs), weight_decay=weight_decay)
    for step in range(10):
        set_gradients(ours, step)
        optimizer.gather_gradients()
        norm = optimizer.step(1e-2 / (step + 1), max_norm)
        set_gradients(theirs, step)
        expected = torch.nn.utils.clip_grad_norm_([p for p in theirs.parameters() if p.requires_grad], max_norm)
        for group in reference.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        reference.step()
        assert norm == pytest.approx(float(expected), rel=1e-6)
    for mine, other in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def test_weight_decay_leaves_out_what_the_trainer_of_transformers_leaves_out(tiny_model: Path):
    """Norms and biases, in two dimensions too; embeddings, heads and the matrices of LoRA decay."""
    model = load.load_model(tiny_model, "float32")
    model.add_module(
        "experts", torch.nn.ParameterDict({"up_proj_bias": torch.ones(4, 8), "up_proj": torch.ones(4, 8, 2)})
    )
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    expected = {n for n, _ in model.named_parameters()} & set(
        get_parameter_names(model, [torch.nn.LayerNorm], patterns)
    )
    load.train_all(model)
    for decay in (0.0, 0.5):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = MasterOptimizer(model, decay)
        optimizer.step(0.1, NO_CLIP)  # gradients of 0: only decay moves a weight
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n]) and before[n].any()}
        assert moved == (expected if decay else set())
    adapted = load.add_lora(load.load_model(tiny_model, "float32"), r=2, alpha=4, target_modules="all-linear", seed=0)
    groups = MasterOptimizer(adapted, 0.5)._optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.5]


def test_small_steps_add_up_in_the_master_where_plain_bfloat16_stands_still():
    """A constant gradient moves Adam by its rate: 200 steps of 1e-5 from 0.5 give 0.498.

    Below 0.5 bf16 values are 2^-9 = 0.00195 apart: one step of 1e-5 rounds back to 0.5, so plain bf16 never moves;
    the master's 0.498 lies 1.02 spacings down, and its copy in the model is the next value, 0.498046875.
    """
    ours, plain = (torch.nn.ParameterDict({"w": torch.full((4,), 0.5, dtype=torch.bfloat16)}) for _ in range(2))
    optimizer = MasterOptimizer(ours, weight_decay=0.0)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-5, weight_decay=0.0)
    for _ in range(200):
        ours["w"].grad = torch.ones_like(ours["w"])
        optimizer.gather_gradients()
        optimizer.step(1e-5, NO_CLIP)
        plain["w"].grad = torch.ones_like(plain["w"])
        reference.step()
    assert plain["w"].tolist() == [0.5] * 4
    assert optimizer.state()["master/w"].tolist() == pytest.approx([0.498] * 4, abs=1e-5)
    assert ours["w"].tolist() == [0.498046875] * 4
    assert ours["w"].dtype == torch.bfloat16


def test_gradients_of_micro_batches_add_up_in_float32():
    """1 + 2^-9 needs 10 bits of mantissa: bf16 accumulation would drop the second term."""
    model = torch.nn.ParameterDict({"w": torch.zeros(1, dtype=torch.bfloat16)})
    optimizer = MasterOptimizer(model, weight_decay=0.0)
    for value in (1.0, 2**-9):
        model["w"].grad = torch.tensor([value], dtype=torch.bfloat16)
        optimizer.gather_gradients()
        assert model["w"].grad is None
    assert optimizer.step(1e-3, NO_CLIP) == 1 + 2**-9


def test_clipping_scales_to_the_limit():
    """Gradient (3, 4): norm 5 before, (0.6, 0.8) after clipping to 1; the first moment is a tenth of it."""
    model = torch.nn.ParameterDict({"w": torch.zeros(2)})
    optimizer = MasterOptimizer(model, weight_decay=0.0)
    model["w"].grad = torch.tensor([3.0, 4.0])
    optimizer.gather_gradients()
    assert optimizer.step(1e-3, 1.0) == pytest.approx(5.0)
    assert optimizer.state()["exp_avg/w"].tolist() == pytest.approx([0.06, 0.08], rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing_and_is_forgotten(bad: float):
    model, clean = network(), network()
    optimizers = [MasterOptimizer(m, weight_decay=0.1) for m in (model, clean)]
    for each, optimizer in zip((model, clean), optimizers, strict=True):
        set_gradients(each, 0)
        optimizer.gather_gradients()
        optimizer.step(1e-2, 1.0)
    before, state = weights(model), {k: v.clone() for k, v in optimizers[0].state().items()}
    set_gradients(model, 1)
    model[1].weight.grad[0, 0] = bad
    optimizers[0].gather_gradients()
    assert not math.isfinite(optimizers[0].step(1e-2, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    assert all(torch.equal(v, state[k]) for k, v in optimizers[0].state().items())
    for each, optimizer in zip((model, clean), optimizers, strict=True):
        set_gradients(each, 2)
        optimizer.gather_gradients()
        optimizer.step(1e-2, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(clean), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_state_continues_to_the_bit(dtype: torch.dtype):
    """Three steps, state, three more; against a fresh model that loads the state and goes on."""
    model = network(dtype)
    optimizer = MasterOptimizer(model, weight_decay=0.01)

    def run(own: torch.nn.Module, its: MasterOptimizer, steps: range) -> None:
        for step in steps:
            set_gradients(own, step)
            its.gather_gradients()
            its.step(1e-3 * (step + 1), 1.0)

    run(model, optimizer, range(3))
    saved = {k: v.clone() for k, v in optimizer.state().items()}
    run(model, optimizer, range(3, 6))
    fresh = network(dtype, seed=9)
    fresh.load_state_dict({**fresh.state_dict(), "0.bias": model[0].bias})  # frozen weights are no part of the state
    again = MasterOptimizer(fresh, weight_decay=0.01)
    again.load_state(saved)
    run(fresh, again, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(fresh), strict=True))
    states = optimizer.state(), again.state()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_moments_are_loaded_and_saved_in_the_given_order():
    """Sharded moments are gathered one by one in collective calls: every rank must go through them in one order, which
    a set of names does not have from process to process."""
    model = network()
    optimizer = MasterOptimizer(model, weight_decay=0.0)
    set_gradients(model, 0)
    optimizer.gather_gradients()
    optimizer.step(1e-2, 1.0)
    state = optimizer.state()
    for given_ in (state, dict(reversed(state.items()))):
        again = MasterOptimizer(network(), weight_decay=0.0)
        again.load_state(given_)
        orders = [[k for k in s if k.endswith("/0.weight") and "master" not in k] for s in (given_, again.state())]
        assert orders[0] == orders[1]
        assert len(orders[0]) == 3


def test_loading_state_brings_the_models_weights_back():
    model = network(torch.bfloat16)
    optimizer = MasterOptimizer(model, weight_decay=0.0)
    set_gradients(model, 0)
    optimizer.gather_gradients()
    optimizer.step(1e-1, 1.0)
    fresh = network(torch.bfloat16)
    MasterOptimizer(fresh, weight_decay=0.0).load_state(optimizer.state())
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(fresh), strict=True))


def rates(num_steps: int, warmup_ratio: float, schedule: str) -> list[float]:
    return [
        learning_rate(s, num_steps, peak=1.0, warmup_ratio=warmup_ratio, schedule=schedule) for s in range(num_steps)
    ]


def test_schedules_at_known_points():
    """10 steps, warmup 2 of them: 1/3, 2/3, then 8 steps from the peak: linear falls by 1/8, cosine is 1/2 at 4."""
    linear, cosine, constant = (rates(10, 0.2, s) for s in ("linear", "cosine", "constant_with_warmup"))
    assert linear == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert cosine[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert cosine[6] == pytest.approx(0.5)
    assert cosine[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert constant == pytest.approx([1 / 3, 2 / 3] + [1] * 8)
    assert rates(4, 0.0, "linear") == pytest.approx([1, 3 / 4, 2 / 4, 1 / 4])
    assert rates(1, 0.0, "cosine") == [1.0]
    assert rates(4, 0.5, "constant") == [1.0] * 4


def test_warmup_in_steps_takes_the_place_of_the_ratio():
    """3 steps of warmup: 1/4, 2/4, 3/4, and the peak at step 3; longer than the run it never gets there."""

    def rate(step: int, num_steps: int, warmup_steps: int, schedule: str) -> float:
        return learning_rate(
            step, num_steps, peak=1.0, warmup_ratio=0.1, warmup_steps=warmup_steps, schedule=schedule
        )  # fmt: skip

    for schedule in ("linear", "cosine", "constant_with_warmup"):
        assert [rate(s, 10, 3, schedule) for s in range(4)] == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1])
    assert [rate(s, 2, 3, "linear") for s in range(2)] == pytest.approx([1 / 4, 2 / 4])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_torch_rmsprop_in_float32(weight_decay: float):
    ours, theirs = network(), network()
    optimizer = MasterOptimizer(ours, weight_decay, "rmsprop")
    reference = torch.optim.RMSprop(by_decay(theirs), lr=1e-3, weight_decay=weight_decay)
    for step in range(5):
        set_gradients(ours, step)
        optimizer.gather_gradients()
        optimizer.step(1e-3, NO_CLIP)
        set_gradients(theirs, step)
        reference.step()
    for mine, other in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_the_optimizers_of_bitsandbytes_step_save_and_go_on_to_the_bit(optim: str, tmp_path: Path):
    """A matrix above 4,096 weights, for smaller ones keep 32-bit moments. Through a file, as checkpoints go."""

    def start() -> tuple[torch.nn.Module, MasterOptimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(80, 80).to(torch.bfloat16)
        return model, MasterOptimizer(model, 0.0, optim)

    def run(model: torch.nn.Module, optimizer: MasterOptimizer, steps: range) -> None:
        for step in steps:
            set_gradients(model, step)
            optimizer.gather_gradients()
            optimizer.step(1e-3, 1.0)

    model, optimizer = start()
    run(model, optimizer, range(3))
    state = optimizer.state()
    assert state["state1/weight"].dtype == (torch.float32 if optim.endswith("32bit") else torch.uint8)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "s.safetensors")
    run(model, optimizer, range(3, 6))
    fresh, again = start()
    assert not torch.equal(weights(fresh)[0], weights(model)[0])
    again.load_state(load_file(tmp_path / "s.safetensors"))
    run(fresh, again, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(fresh), strict=True))


def test_an_optimizer_of_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingInputError, match="adamw_8bit needs the package bitsandbytes") as caught:
        MasterOptimizer(network(), 0.0, "adamw_8bit")
    assert caught.value.exit_code == 66
    assert "pip install" in caught.value.hint


@settings(deadline=None)
@given(
    st.integers(1, 300),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(["linear", "cosine", "constant", "constant_with_warmup"]),
)
def test_rates_are_positive_rise_then_never_rise_again(num_steps: int, warmup_ratio: float, schedule: str):
    found = rates(num_steps, warmup_ratio, schedule)
    top = found.index(max(found))
    assert all(0 < r <= 1 for r in found)
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
