"""The memory probe: what it counts is what autograd keeps, it grows with tokens, and the budget follows from it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.forward.head import CHUNK
from prefpipe.forward.layout import Tree
from prefpipe.forward.logps import TreeModel, causal_model
from prefpipe.stages.train import memory
from prefpipe.stages.train.memory import Footprint, budget, free_bytes, measure
from tests import tiny
from tests.conftest import ROOT
from tests.stages.train import data
from tests.stages.train.peak import trees

pytestmark = pytest.mark.usefixtures("as_for_users")

CUDA = torch.device("cuda")
FOOTPRINT = Footprint(
    weights=10**9, adapter=10**6, optimizer=8 * 10**6, head=3 * 10**7, activations_fixed=10**6,
    activations_per_token=2e5, train_seconds_per_token=1e-3, score_seconds_per_token=3e-4,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> TreeModel:
    return data.policy(tiny_model)


@pytest.mark.parametrize("rows", ["shared", "separate"])
def test_activations_are_linear_in_tokens(tiny_model: Path, rows: Literal["shared", "separate"]):
    """Twice the tokens keep twice the bytes within 10 %; the footprint foretells other sizes within 10 %."""
    model = data.policy(tiny_model)
    model.set_rows(rows)
    kept = {n: memory._kept(model, trees(n))[0] for n in (4, 8, 16, 32)}
    for number in (4, 8, 16):
        assert kept[2 * number] == pytest.approx(2 * kept[number], rel=0.1)
    found = measure(model, trees(40))
    for number, size in kept.items():
        assert found.activations(number * 64) >= 0.9 * size  # what the allocator took is never less
    assert all(p.grad is None for p in model.parameters())


def test_what_is_counted_is_at_least_what_a_layer_must_keep(model: TreeModel):
    """Two layers of hidden 64 and intermediate 128 in fp32: at least 16 H + 8 I bytes per token and layer, and less
    than ten times that; weights and the input are not counted."""
    per_layer = 16 * 64 + 8 * 128
    kept, _ = memory._kept(model, trees(40))
    assert 2 * per_layer < kept / (40 * 64) < 20 * per_layer
    assert measure(model, trees(40)).activations_per_token > 2 * per_layer
    tiny, _ = memory._kept(model, [Tree([5], ([6],))])
    assert tiny < 2 * 20 * per_layer < sum(p.nbytes for p in model.parameters()) / 4  # a row of two tokens


def test_separate_rows_cost_what_they_compute(tiny_model: Path):
    """Prompts of 24 and two completions of 2 tokens: a tree computes 28 tokens, separate rows 52."""
    found: list[int] = []
    for rows in ("shared", "separate"):
        model = data.policy(tiny_model)
        model.set_rows(rows)
        found.append(memory._kept(model, trees(40, 2))[0])
    assert 1.4 < found[1] / found[0] < 52 / 28 * 1.1


def test_a_tree_longer_than_both_probes_is_probed_once(model: TreeModel):
    """A probe is two passes; one more takes the time of scoring."""
    passes: list[int] = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    found = measure(model, trees(1, 600))
    assert len(passes) == 3
    assert found.activations_fixed == 0
    measure(model, trees(40))
    hook.remove()
    assert len(passes) == 3 + 5


def test_fixed_parts_are_counted_from_the_parameters(model: TreeModel):
    found = measure(model, trees(40))
    trainable = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trainable)
    assert found.adapter == 2 * 4 * count
    assert found.optimizer == 8 * count  # two moments; a float32 weight is its own master
    assert found.weights == sum(p.nbytes for p in causal_model(model.policy).parameters() if not p.requires_grad)
    assert found.head == 264 * (4 * CHUNK + 3 * 4 * 8)  # scores of a chunk, and float32 work on eight rows of it
    assert min(found.train_seconds_per_token, found.score_seconds_per_token) > 0
    assert found.peak(1000) == found.weights + found.adapter + found.optimizer + found.head + found.activations(1000)


def test_a_single_pair_longer_than_the_probe_is_enough(model: TreeModel):
    """Both probes are then the same tree: the slope is its bytes per token."""
    long = Tree([5] * 600, ([6] * 30, [7] * 30))
    found = measure(model, [long])
    assert found.activations(660) >= memory._kept(model, [long])[0]
    assert found.activations_fixed == pytest.approx(0, abs=1)


def test_the_prediction_is_near_what_the_process_takes(tmp_path: Path):
    """A model whose activations dwarf the noise of a process; `benchmarks/plan_accuracy.py` does it on a real one."""
    large = tiny.make_model(tmp_path / "model", spread=0.02, hidden_size=1024)
    done = subprocess.run(
        [sys.executable, "-m", "tests.stages.train.peak", str(large)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    predicted, taken = map(float, done.stdout.split())
    assert taken > 5e7
    assert predicted == pytest.approx(taken, rel=0.35)


def test_probing_leaves_the_random_state(model: TreeModel):
    """Data order and weights are fixed by seeds of their own, but a probe must not move torch's either."""
    before = torch.get_rng_state()
    measure(model, trees(10))
    assert torch.equal(torch.get_rng_state(), before)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e12), min_size=2, max_size=8), st.integers(1, 10**5))
def test_the_budget_grows_with_free_memory_and_holds_the_longest_tree(free: list[float], longest: int):
    found = [budget(FOOTPRINT, CUDA, f, longest) for f in sorted(free)]
    assert found == sorted(found)
    assert all(longest <= tokens <= max(longest, 32768) for tokens in found)
    assert all(tokens >= 256 for tokens in found)


@settings(deadline=None)
@given(st.floats(2e9, 2e11), st.floats(1.1, 10))
def test_a_step_of_the_budget_fits_into_the_share_of_free_memory(free: float, factor: float):
    """What comes on top of the loaded weights and adapter stays below 80 % of what was free; larger activations give
    a smaller budget."""
    tokens = budget(FOOTPRINT, CUDA, free, 1)
    on_top = FOOTPRINT.peak(tokens) - FOOTPRINT.weights - FOOTPRINT.adapter
    assert on_top <= 0.8 * free
    heavier = replace(FOOTPRINT, activations_per_token=FOOTPRINT.activations_per_token * factor)
    assert budget(heavier, CUDA, free, 1) <= tokens


def test_by_hand():
    """free 1e9: 0.8e9 - 8e6 - 3e7 - 1e6 = 761e6 bytes left, 2e5 each: 3805 tokens."""
    assert budget(FOOTPRINT, CUDA, 1e9, 100) == 3805
    assert budget(FOOTPRINT, CUDA, 1e9, 5000) == 5000
    assert budget(FOOTPRINT, CUDA, 0, 100) == 256
    assert budget(FOOTPRINT, torch.device("cpu"), 1e9, 100) == 768


def test_free_memory_is_what_the_kernel_says():
    free = free_bytes(torch.device("cpu"))
    assert 10**7 < free < 10**14
