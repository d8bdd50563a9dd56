"""The loop against a plain training loop written here, its resume, its metrics, and how it stops on bad numbers."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch.nn.functional import logsigmoid

from prefpipe.config.train import TrainConfig
from prefpipe.errors import PrefpipeError
from prefpipe.forward.logps import TreeModel, causal_model
from prefpipe.stages.train import loop
from prefpipe.stages.train.examples import TrainCompletion, TrainLabel, TrainPair
from prefpipe.stages.train.loop import StepMetrics
from prefpipe.stages.train.micro_batches import global_batches, micro_batches
from prefpipe.stages.train.optimizer import learning_rate
from prefpipe.stages.train.parallel import World
from tests.stages.train import data
from tests.stages.train.data import lora, plain_logp, policy, trainer


@pytest.fixture(scope="module")
def pairs(tiny_model: Path) -> list[TrainPair]:
    """Ten pairs of five prompts, with the base's own log-probs; weights that are not all 1."""
    own = data.to_train_pairs(data.with_reference(data.bare_pairs(10), tiny_model))
    return [replace(p, weight=w) for p, w in zip(own, [0.5, 1.5] * 5, strict=True)]


def run(model: TreeModel, pairs: Sequence[TrainPair], config: TrainConfig) -> list[StepMetrics]:
    return list(loop.steps(trainer(model, config), pairs, 0))


def batches(pairs: Sequence[TrainPair], config: TrainConfig, epoch: int) -> list[list[int]]:
    return global_batches([p.prompt_ids for p in pairs], config.train_batch_size, config.seed, epoch, together=False)


def plain_training(policy_model: TreeModel, pairs: Sequence[TrainPair], config: TrainConfig) -> list[float]:
    """Textbook DPO + 0.5 NLL: a row per completion, transformers' attention, torch's AdamW; loss is sum w l / G."""
    policy_model.set_rows("separate")
    model = policy_model.policy
    trainable = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trainable, weight_decay=config.weight_decay)
    total, losses = loop.num_steps(len(pairs), config), []
    for step in range(total):
        epoch, within = divmod(step, total // config.num_train_epochs)
        batch = [pairs[i] for i in batches(pairs, config, epoch)[within]]
        loss = torch.zeros(())
        for p in batch:
            chosen, rejected = (plain_logp(model, p.prompt_ids, ids) for ids in (p.chosen, p.rejected))
            h = (chosen - sum(p.ref_chosen or ())) - (rejected - sum(p.ref_rejected or ()))
            loss = loss + p.weight * (-logsigmoid(config.beta * h) - 0.5 * chosen / len(p.chosen)) / len(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, config.max_grad_norm)
        adamw.param_groups[0]["lr"] = learning_rate(
            step, total, peak=config.learning_rate, warmup_ratio=config.warmup_ratio, schedule=config.lr_scheduler_type
        )
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses


def test_equals_a_plain_training_loop(tiny_model: Path, pairs: list[TrainPair]):
    """Six steps of two epochs, a smaller last batch, clipping, weights: losses to 1e-5, weights to 1e-3 relative."""
    config = data.config(
        tiny_model, loss_type=("sigmoid", "nll"), loss_weights=(1.0, 0.5), weight_decay=0.01, max_grad_norm=0.5
    )
    ours, theirs = policy(tiny_model), policy(tiny_model)
    start = torch.cat([v.flatten() for v in lora(ours).values()])
    found = run(ours, pairs, config)
    expected = plain_training(theirs, pairs, config)
    assert [m.num_rows for m in found] == [4, 4, 2, 4, 4, 2]
    assert [m.values["loss"] for m in found] == pytest.approx(expected, rel=1e-5)
    mine, other = (torch.cat([v.flatten() for v in lora(m).values()]) for m in (ours, theirs))
    assert (mine - other).norm() <= 1e-3 * (other - start).norm()


def test_step_0_is_ln_2_and_the_margin_rises(tiny_model: Path, pairs: list[TrainPair]):
    pairs = [replace(p, weight=1.0) for p in pairs]
    found = run(policy(tiny_model), pairs, data.config(tiny_model, num_train_epochs=5, beta=1.0))
    first, last = found[0].values, found[-1].values
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(first["rewards/margins"]) < 1e-4
    assert last["loss"] < 0.5 * first["loss"]
    assert last["rewards/margins"] > 1
    assert last["rewards/accuracies"] == 1


def test_metrics_are_means_over_the_step(tiny_model: Path, pairs: list[TrainPair]):
    """Step 0, policy = reference: logps/chosen is the mean of the cached sums of the step's pairs."""
    config = data.config(tiny_model, max_tokens_per_micro_batch=40)
    steps = loop.steps(trainer(policy(tiny_model), config), pairs, 0)
    first = next(steps)
    rows = batches(pairs, config, 0)[0]
    expected = sum(sum(pairs[r].ref_chosen or ()) for r in rows) / 4
    assert first.values["logps/chosen"] == pytest.approx(expected, rel=1e-5)
    assert (first.step, steps.num_steps, first.num_rows) == (0, 6, 4)
    assert first.values["epoch"] == pytest.approx(1 / 3)
    trees = [tree for micro in micro_batches([pairs[r] for r in rows], 40) for tree in micro.trees]
    prompts = sum(len(tree.prompt) for tree in trees)
    assert first.values["tokens/scored_share"] == pytest.approx(1 - prompts / sum(tree.num_tokens for tree in trees))
    assert first.values["learning_rate"] == pytest.approx(config.learning_rate / 2)  # warmup of one step
    assert set(first.values) == {
        "loss", "grad_norm", "learning_rate", "epoch", "logps/chosen", "logps/rejected", "logps/accuracies",
        "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "rewards/abs_margins",
        "rewards/gradient_weights", "rewards/saturated", "rewards/both_fall", "deltas/chosen", "deltas/rejected",
        "lengths/chosen", "lengths/rejected", "tokens/unique", "tokens/logical", "tokens/scored_share",
        "rewards/margins/len_0_64",
        *(f"rewards/{n}/{q}" for n in ("chosen", "rejected", "margins") for q in ("p05", "p50", "p95")),
    }  # fmt: skip
    assert first.values["lengths/chosen"] == sum(len(pairs[r].chosen) for r in rows) / 4
    logical = sum(2 * len(pairs[r].prompt_ids) + len(pairs[r].chosen) + len(pairs[r].rejected) for r in rows)
    assert first.values["tokens/logical"] == logical
    by_prompt = {pairs[r].prompt_ids: {c for q in rows for c in (pairs[q].chosen, pairs[q].rejected)
                                   if pairs[q].prompt_ids == pairs[r].prompt_ids} for r in rows}  # fmt: skip
    unique = sum(len(prompt) + sum(map(len, completions)) for prompt, completions in by_prompt.items())
    assert first.values["tokens/unique"] == unique < logical


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_from_any_step_is_the_same_to_the_bit(tiny_model: Path, pairs: list[TrainPair], dtype: str):
    config = data.config(tiny_model, dtype=dtype)
    whole = policy(tiny_model, dtype)
    metrics = run(whole, pairs, config)
    for stop in (1, 3, 5):
        interrupted = trainer(policy(tiny_model, dtype), config)
        steps = loop.steps(interrupted, pairs, 0)
        before = [next(steps) for _ in range(stop)]
        saved = {k: v.clone() for k, v in interrupted.optimizer.state().items()}
        kept = {k: v.clone() for k, v in saved.items()}
        fresh = policy(tiny_model, dtype)
        again = trainer(fresh, config)
        again.optimizer.load_state(saved)
        after = list(loop.steps(again, pairs, stop))
        assert all(torch.equal(v, kept[k]) for k, v in saved.items())  # what was loaded is a copy
        assert before + after == metrics
        assert all(torch.equal(v, lora(whole)[k]) for k, v in lora(fresh).items())


def test_identical_sides_give_no_dpo_gradient(tiny_model: Path, pairs: list[TrainPair]):
    """chosen == rejected: h = 0 for any policy, and the two gradients cancel."""
    same = [replace(p, rejected=p.chosen, ref_rejected=p.ref_chosen, weight=1.0) for p in pairs[:4]]
    (metrics,) = run(policy(tiny_model), same, data.config(tiny_model, num_train_epochs=1))
    assert metrics.values["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert metrics.values["grad_norm"] == pytest.approx(0, abs=1e-6)
    assert metrics.values["rewards/accuracies"] == 0.5


def test_row_weights_scale_the_gradient(tiny_model: Path, pairs: list[TrainPair]):
    """All weights doubled: loss and gradient norm double."""
    config = data.config(tiny_model, num_train_epochs=1, train_batch_size=10)
    ones, twos = (run(policy(tiny_model), [replace(p, weight=w) for p in pairs], config)[0] for w in (1.0, 2.0))
    assert twos.values["loss"] == pytest.approx(2 * ones.values["loss"], rel=1e-6)
    assert twos.values["grad_norm"] == pytest.approx(2 * ones.values["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_with_its_rows_and_moves_nothing(
    tiny_model: Path, pairs: list[TrainPair], weight: float
):
    """One bad row of ten, in steps of four: its step moves nothing and the others do. Metrics stay valid JSON."""
    bad = [replace(pairs[0], weight=weight), *pairs[1:]]
    config = data.config(tiny_model, num_train_epochs=1)
    place = next(i for i, rows in enumerate(batches(bad, config, 0)) if 0 in rows)
    model = policy(tiny_model)
    states = [lora(model)]
    found: list[StepMetrics] = []
    for step in loop.steps(trainer(model, config), bad, 0):
        found.append(step)
        states.append(lora(model))
    assert [bool(step.skipped) for step in found] == [i == place for i in range(3)]
    assert set(found[place].skipped) == {bad[r].pair_id for r in batches(bad, config, 0)[place]}
    assert all(math.isfinite(value) for step in found for value in step.values.values())
    assert "loss" not in found[place].values
    assert "grad_norm" not in found[place].values
    still = [all(torch.equal(v, after[k]) for k, v in before.items()) for before, after in pairwise(states)]
    assert still == [i == place for i in range(3)]


def test_a_skipped_step_leaves_no_gradient_behind(tiny_model: Path, pairs: list[TrainPair]):
    """The step after it is the step of a run that had no such row: same first moment, so the same update."""
    config = data.config(tiny_model, num_train_epochs=1, train_batch_size=4)
    order = [row for batch in batches(pairs[:8], config, 0) for row in batch]
    rows = list(pairs[:8])
    rows[order[0]] = replace(rows[order[0]], weight=math.nan)
    disturbed = trainer(policy(tiny_model), config)
    list(loop.steps(disturbed, rows, 0))
    clean = trainer(policy(tiny_model), config)
    list(loop.steps(clean, pairs[:8], 1))
    theirs = clean.optimizer.state()
    assert all(torch.equal(v, theirs[k]) for k, v in disturbed.optimizer.state().items())


def test_nll_alone_needs_no_reference(tiny_model: Path, pairs: list[TrainPair]):
    """Its step-0 loss is the mean over pairs of -logp / length, and no reward is reported."""
    bare = [replace(p, ref_chosen=None, ref_rejected=None, weight=1.0) for p in pairs[:4]]
    config = data.config(tiny_model, loss_type=("nll",), num_train_epochs=1)
    (metrics,) = run(policy(tiny_model), bare, config)
    expected = sum(-sum(p.ref_chosen or ()) / len(p.chosen) for p in pairs[:4]) / 4
    assert metrics.values["loss"] == pytest.approx(expected, rel=1e-5)
    assert not any(name.startswith("rewards/") for name in metrics.values)


def test_a_metric_of_some_pairs_does_not_depend_on_the_token_budget(tiny_model: Path, pairs: list[TrainPair]):
    """NLL with references on the pairs of three prompts of five: micro-batches must not change a metric."""
    mixed = [replace(p, ref_chosen=None, ref_rejected=None) if i % 5 < 2 else p for i, p in enumerate(pairs)]
    found: list[dict[str, float]] = []
    for budget in (10**6, 16):
        config = data.config(
            tiny_model, loss_type=("nll",), num_train_epochs=1, train_batch_size=10, max_tokens_per_micro_batch=budget
        )
        found.append(run(policy(tiny_model), mixed, config)[0].values)
    assert found[0].keys() == found[1].keys()
    assert list(found[0].values()) == pytest.approx(list(found[1].values()), rel=1e-4)


def first_moment(model: TreeModel, pairs: Sequence[TrainPair], config: TrainConfig) -> torch.Tensor:
    """After one step Adam's first moment is 0.1 x the (unclipped) gradient."""
    started = trainer(model, config)
    next(loop.steps(started, pairs, 0))
    moments = [v.flatten() for k, v in sorted(started.optimizer.state().items()) if k.startswith("exp_avg/")]
    return torch.cat(moments)


@pytest.mark.parametrize("rows", ["shared", "separate"])
def test_every_budget_gives_the_same_gradient(tiny_model: Path, rows: Literal["shared", "separate"]):
    """128 pairs of 20 prompts, weights, DPO + NLL, cut by {10^9, 2000, 512, 64} tokens: relative 1e-5.

    In separate rows too, and both kinds agree with each other.
    """
    many = [
        replace(p, ref_chosen=(-50.0,), ref_rejected=(-55.0,), weight=0.5 + (i % 3) / 2)
        for i, p in enumerate(data.to_train_pairs(data.bare_pairs(128, num_prompts=20)))
    ]
    counts: list[int] = []
    found: list[torch.Tensor] = []
    for budget in (10**9, 2000, 512, 64):
        counts.append(len(micro_batches(many, budget)))
        config = data.config(
            tiny_model, train_batch_size=128, loss_type=("sigmoid", "nll"), loss_weights=(1.0, 0.3),
            max_grad_norm=1e9, max_tokens_per_micro_batch=budget,
        )  # fmt: skip
        model = policy(tiny_model)
        model.set_rows(rows)
        found.append(first_moment(model, many, config))
    assert counts == [1, 1, 4, 20]
    model.set_rows("shared")
    found.append(first_moment(policy(tiny_model), many, config))
    assert found[0].norm() > 0
    for other in found[1:]:
        assert (other - found[0]).norm() <= 1e-5 * found[0].norm()


class Full:
    """Runs out of memory in the forward calls whose numbers are given (all from the first for None)."""

    def __init__(self, model: TreeModel, at: set[int] | None) -> None:
        self.calls = 0
        self._at = at
        causal_model(model.policy).base_model.layers[1].register_forward_pre_hook(self)

    def __call__(self, *_: object) -> None:
        self.calls += 1
        if self._at is None or self.calls in self._at:
            raise torch.OutOfMemoryError("no room")


def largest_load(pairs: Sequence[TrainPair], budget: int) -> int:
    return max(sum(tree.num_tokens for tree in micro.trees) for micro in micro_batches(pairs, budget))


@pytest.fixture(scope="module")
def many(tiny_model: Path) -> list[TrainPair]:
    """Forty pairs of twenty prompts."""
    return data.to_train_pairs(data.with_reference(data.bare_pairs(40, num_prompts=20), tiny_model))


@pytest.mark.parametrize(
    ("at", "budget"),
    [({1}, 300), ({3}, 300), ({1, 2}, 600), ({1}, 10**9)],
    ids=["at once", "in a later micro-batch", "twice", "far above the data"],
)
def test_out_of_memory_halves_the_largest_micro_batch_and_does_the_batch_again(
    tiny_model: Path, many: list[TrainPair], at: set[int], budget: int, capsys: pytest.CaptureFixture[str]
):
    """Gradients of the micro-batches before it are forgotten: weights and metrics are those of an undisturbed run.

    The new budget is half of what was tried, not of what was allowed: the first replay already differs.
    """
    config = data.config(tiny_model, train_batch_size=40, num_train_epochs=1, max_tokens_per_micro_batch=budget)
    whole, disturbed = policy(tiny_model), policy(tiny_model)
    expected = run(whole, many, config)
    full = Full(disturbed, at)
    started = trainer(disturbed, config)
    found = list(loop.steps(started, many, 0))
    wanted = budget
    for _ in at:
        assert len(micro_batches(many, largest_load(many, wanted) // 2)) > len(micro_batches(many, wanted))
        wanted = min(wanted, largest_load(many, wanted)) // 2
    assert started.budget == wanted > 64
    assert full.calls > max(at)
    assert f"out of memory: micro-batches now hold {wanted} tokens" in capsys.readouterr().err
    for name, weight in lora(disturbed).items():
        torch.testing.assert_close(weight, lora(whole)[name], rtol=0, atol=1e-6)
    for mine, other in zip(found, expected, strict=True):
        assert mine.values == pytest.approx(other.values, rel=1e-4, abs=1e-5)


def test_out_of_memory_in_rows_to_imitate_halves_their_micro_batch(tiny_model: Path, many: list[TrainPair]):
    """An answer of 300 tokens behind four pairs of fewer: half of its load is what is tried next, with the same end."""
    answer = TrainLabel("a", (5,) * 10, TrainCompletion("a", (7,) * 290, None), None, 1.0)
    config = data.config(tiny_model, train_batch_size=4, num_train_epochs=1, sft=("a.jsonl",), sft_batch_size=1)
    assert largest_load(many[:4], 10**9) < 300
    whole, disturbed = trainer(policy(tiny_model), config), trainer(policy(tiny_model), config)
    (expected,) = loop.steps(whole, many[:4], 0, (), [answer])
    Full(disturbed.model, {2})
    (found,) = loop.steps(disturbed, many[:4], 0, (), [answer])
    assert disturbed.budget == 150
    assert found.values == pytest.approx(expected.values, rel=1e-4, abs=1e-5)
    assert found.values["sft/tokens"] == 290


def test_a_skipped_step_names_its_rows_to_imitate(tiny_model: Path, pairs: list[TrainPair]):
    answer = TrainLabel("answer", (5,) * 3, TrainCompletion("answer", (7,) * 4, None), None, 1.0)
    config = data.config(tiny_model, num_train_epochs=1, train_batch_size=10, sft=("a.jsonl",), sft_batch_size=1)
    bad = [replace(pairs[0], weight=math.nan), *pairs[1:]]
    (step,) = loop.steps(trainer(policy(tiny_model), config), bad, 0, (), [answer])
    assert set(step.skipped) == {"answer", *(pair.pair_id for pair in pairs)}


def test_out_of_memory_at_the_smallest_budget_names_the_flag(tiny_model: Path, many: list[TrainPair]):
    """Loads of at most 256, 128 and 64 tokens are tried, then it stops; nothing has moved, no gradient is left."""
    model = policy(tiny_model)
    before = lora(model)
    full = Full(model, None)
    started = trainer(model, data.config(tiny_model, train_batch_size=40, max_tokens_per_micro_batch=256))
    with pytest.raises(PrefpipeError, match=r"with (\d+) tokens") as caught:
        list(loop.steps(started, many, 0))
    assert int(caught.value.message.split("with ")[1].split()[0]) <= 64
    assert "--max-tokens-per-micro-batch" in (caught.value.hint or "")
    assert caught.value.exit_code == 1
    assert full.calls == 3
    assert all(torch.equal(v, before[k]) for k, v in lora(model).items())
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_one_rank_of_several_cannot_change_the_budget_alone(tiny_model: Path, pairs: list[TrainPair]):
    """The other ranks would wait for calls that never come: it stops at once, and names the flag."""
    model = policy(tiny_model)
    full = Full(model, {1})
    started = replace(trainer(model, data.config(tiny_model, max_tokens_per_micro_batch=256)), world=World(0, 2))
    with pytest.raises(PrefpipeError, match="out of memory") as caught:
        list(loop.steps(started, pairs, 0))
    assert "--max-tokens-per-micro-batch" in (caught.value.hint or "")
    assert (full.calls, started.budget) == (1, 256)


def test_grouping_by_prompt_changes_the_order_only(tiny_model: Path, pairs: list[TrainPair]):
    """All pairs in one step: the same gradient; in steps of two: both pairs of a prompt share a tree."""
    apart, together = (
        data.config(tiny_model, group_by_prompt=flag, train_batch_size=10, num_train_epochs=1) for flag in (False, True)
    )
    (one,), (other,) = (run(policy(tiny_model), pairs, config) for config in (apart, together))
    assert one.values == pytest.approx(other.values, rel=1e-5, abs=1e-6)
    by_two = data.config(tiny_model, group_by_prompt=True, train_batch_size=2, num_train_epochs=1)
    for step in run(policy(tiny_model), pairs, by_two):
        assert step.values["tokens/unique"] < step.values["tokens/logical"] - 4  # the prompt once instead of 4 times


def test_number_of_steps(tiny_model: Path):
    """10 pairs in steps of 4 are 3 steps an epoch, the last of 2 pairs."""
    assert loop.num_steps(10, data.config(tiny_model, num_train_epochs=3)) == 9
    assert loop.num_steps(8, data.config(tiny_model, num_train_epochs=1)) == 2
    assert loop.num_steps(1, data.config(tiny_model, num_train_epochs=1)) == 1
