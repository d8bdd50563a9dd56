"""Checks of whole passes: a training step beside plain transformers, a large model with a long row, scoring, and what
the optimizer and a checkpoint cost."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedConfig

from card import measure
from card.kernels import limit_of
from card.record import Figure
from card.sizes import Bench, Case, build, rows
from card.worker import Found
from prefpipe.config.train import TrainConfig
from prefpipe.forward import load
from prefpipe.forward.layout import Span, Tree
from prefpipe.forward.logps import TreeModel, score, self_test
from prefpipe.stages.train import checkpoint, loop, memory
from prefpipe.stages.train.examples import TrainPair
from prefpipe.stages.train.host_copies import HostCopies
from prefpipe.stages.train.micro_batches import micro_batches
from prefpipe.stages.train.optimizer import MasterOptimizer
from prefpipe.stages.train.parallel import World

BETA = 0.1
STEPS = 2  # that are measured; one goes before them
NOISE = 0.2  # nats in one token between two ways to compute it in 16 bits


def small(bench: Bench) -> Found:
    """Steps of the small model for all cases, without checkpointing: ours, its bare forward and backward, and the
    chosen and rejected rows of every pair in plain transformers (SDPA). All rows of a case have one length, so that
    nothing is lost to padding on their side."""
    sizes = bench.sizes
    model = bench.lora(sizes.small)
    trees = [tree for micro in micro_batches(rows(sizes.cases[0], sizes.small.vocab_size), 1) for tree in micro.trees]
    yield Figure("largest difference from plain passes", self_test(model, trees[:2]), "nats", NOISE, at_most=True)
    for case in sizes.cases:
        pairs = rows(case, sizes.small.vocab_size)
        ours = tree_seconds(model, pairs, sizes.tokens)
        yield from _speed(bench, sizes.small, case, pairs, ours)
        bare = _bare(model, pairs, sizes.tokens)
        yield Figure(f"{case.name}: step over bare forward and backward", ours / bare, "x", 1.10, at_most=True)
        yield Figure(
            f"{case.name}: peak", measure.peak(_one_step(model, pairs, sizes.tokens), sizes.device) / 2**30, "GiB"
        )
        model.set_rows("separate")  # the attention of transformers: SDPA
        plain = plain_step(
            model.policy, pairs, case, max(1, sizes.tokens // 2 // (2 * (case.prompt + case.completion)))
        )
        taken = measure.typical(plain, sizes.device, times=1)
        yield Figure(f"{case.name}: plain transformers", len(pairs) / taken, "pairs/s")
        yield Figure(f"{case.name}: plain transformers, peak", measure.peak(plain, sizes.device) / 2**30, "GiB")
        model.set_rows("shared")
        yield Figure(f"{case.name}: speed over plain transformers", taken / ours, "x")


def full_optimizer(bench: Bench) -> Found:
    """An optimizer step over every weight of the small model: float32 masters and two moments."""
    bench.drop()
    model = build(bench.sizes.small, bench.sizes)
    load.train_all(model)
    optimizer = MasterOptimizer(model, 0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.gather_gradients()
    taken = measure.typical(lambda: optimizer.step(1e-6, 1.0), bench.sizes.device)
    weights = sum(p.numel() for p in model.parameters())
    yield Figure("optimizer step over all weights", taken * 1e3, "ms")
    yield Figure("optimizer step over all weights", 28 * weights / taken / 1e9, "GB/s")  # 16 read, 12 written
    bench.drop()


def large(bench: Bench) -> Found:
    """Steps of the large model with and without checkpointing, and a pair with a long prompt; the peak of memory that
    `plan` predicts from a probe of short rows, against the measured one."""
    sizes = bench.sizes
    bench.drop()
    model = bench.lora(sizes.large)
    pairs = rows(sizes.large_case, sizes.large.vocab_size)
    probe = [tree for micro in micro_batches(pairs, 1) for tree in micro.trees]
    on, off = "with checkpointing", "without checkpointing"
    for name, long in ((off, False), (on, False), (on, True)):
        case = sizes.long if long else sizes.large_case
        tokens = case.prompt + 2 * case.completion if long else sizes.large_tokens
        if name == on and not long:
            load.checkpoint_layers(model.policy)
        pairs = rows(case, sizes.large.vocab_size)
        step = _one_step(model, pairs, tokens)
        largest = max(sum(tree.num_tokens for tree in micro.trees) for micro in micro_batches(pairs, tokens))
        predicted = memory.measure(model, probe).peak(largest)
        peak = measure.peak(step, sizes.device)
        yield Figure(f"{case.name} {name}: peak", peak / 2**30, "GiB")
        if sizes.device.type == "cuda":  # a process holds more than its tensors
            error = abs(predicted / peak - 1)
            yield Figure(f"{case.name} {name}: error of the predicted peak", error, "", 0.2, at_most=True)
        yield from _speed(bench, sizes.large, case, pairs, measure.seconds(step, sizes.device), f" {name}")


def scoring(bench: Bench) -> Found:
    """Tokens a second of the reference pass over the large model, by the tokens of a pass."""
    sizes = bench.sizes
    model = bench.lora(sizes.large)
    for pack in sizes.packs:
        case = sizes.large_case
        size = case.prompt + 2 * case.completion
        pairs = rows(Case(case.prompt, case.completion, 2, max(1, pack // size)), sizes.large.vocab_size)
        trees = [Tree(p.prompt_ids, (p.chosen, p.rejected)) for p in pairs]
        with load.adapter_off(model.policy, off=True):
            taken = measure.typical(lambda t=trees, n=pack: list(score(model, t, n)), sizes.device, times=1)
        tokens = sum(tree.num_tokens for tree in trees)
        yield Figure(f"packs of {pack}", tokens / taken, "tokens/s")
        layout = model.layout(trees)
        work = measure.operations(sizes.large, list(layout.spans), len(layout.targets), training=False)
        yield Figure(f"packs of {pack}: of the card's matrix products", work / taken / limit_of(bench), "")


def checkpoints(bench: Bench) -> Found:
    """The optimizer step and a checkpoint of the adapter of the large model."""
    sizes = bench.sizes
    model = bench.lora(sizes.large)
    optimizer = MasterOptimizer(model, 0.0)
    yield Figure("optimizer step over the adapter", _adapter_step(model, optimizer, sizes.device) * 1e3, "ms")
    with tempfile.TemporaryDirectory() as folder:
        done = checkpoint.Checkpoint(1, 0, "", optimizer.state())
        written = measure.seconds(lambda: checkpoint.save(Path(folder), done, "benchmark"), sizes.device)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    copies = HostCopies()
    for name in ("first copy to the host", "copy to the host"):  # the first one makes the memory
        copied = measure.seconds(lambda: copies.take(done.tensors, leads=True), sizes.device)
        yield Figure(f"checkpoint of the adapter: {name}", copied, "s")
    yield Figure("checkpoint of the adapter: write", written, "s")
    yield Figure("checkpoint of the adapter: size", size / 2**30, "GiB")


def tree_seconds(model: TreeModel, pairs: Sequence[TrainPair], tokens: int) -> float:
    """Seconds of a whole optimizer step of the training loop on these pairs, micro-batches of `tokens` tokens."""
    device = next(model.parameters()).device
    running = _steps(model, pairs, tokens, STEPS + 1)
    next(running)
    return median(measure.seconds(lambda: next(running), device) for _ in range(STEPS))


def _steps(model: TreeModel, pairs: Sequence[TrainPair], tokens: int, count: int) -> loop.Steps:
    config = TrainConfig(
        train_batch_size=len(pairs), num_train_epochs=count, learning_rate=1e-5, lr_scheduler_type="constant",
        warmup_ratio=0.0, beta=BETA, max_tokens_per_micro_batch=tokens,
    )  # fmt: skip
    trainer = loop.Trainer(model, model, MasterOptimizer(model, 0.0), config, World(0, 1), tokens)
    return loop.steps(trainer, pairs, 0)


def _one_step(model: TreeModel, pairs: Sequence[TrainPair], tokens: int) -> Callable[[], object]:
    return lambda: next(_steps(model, pairs, tokens, 1))


def _speed(
    bench: Bench, config: PreTrainedConfig, case: Case, pairs: Sequence[TrainPair], taken: float, how: str = ""
) -> Found:
    """Pairs a second, tokens a second as separate rows count them, and the share of the card's matrix products."""
    spans: list[Span] = []
    scored = 0
    for micro in micro_batches(pairs, 1):
        for tree in micro.trees:
            parts = tuple((0, len(c)) for c in tree.completions)
            spans.append(Span(0, len(tree.prompt), parts))
            scored += sum(map(len, tree.completions))
    work = measure.operations(config, spans, scored, training=True)
    yield Figure(f"{case.name}{how}: step", len(pairs) / taken, "pairs/s")
    yield Figure(
        f"{case.name}{how}: step", 2 * len(pairs) * (case.prompt + case.completion) / taken, "tokens/s in separate rows"
    )
    yield Figure(f"{case.name}{how}: of the card's matrix products", work / taken / limit_of(bench), "")


def _bare(model: TreeModel, pairs: Sequence[TrainPair], tokens: int) -> float:
    """Seconds of forward and backward of the log-probs of the same micro-batches, without loss, masters and metrics."""
    layouts = [model.layout(micro.trees) for micro in micro_batches(pairs, tokens)]

    def both() -> None:
        for layout in layouts:
            model(layout).sum().backward()

    taken = measure.typical(both, next(model.parameters()).device, STEPS)
    for parameter in model.parameters():
        parameter.grad = None
    return taken


def plain_step(policy: Any, pairs: Sequence[TrainPair], case: Case, at_once: int) -> Callable[[], object]:
    """A DPO step with cached reference log-probs as it is usually written: chosen and rejected rows in one batch, full
    logits of the completions, `at_once` pairs in a pass, AdamW over the adapter."""
    device = next(policy.parameters()).device
    chosen = torch.tensor([[*p.prompt_ids, *p.chosen] for p in pairs], device=device)
    rejected = torch.tensor([[*p.prompt_ids, *p.rejected] for p in pairs], device=device)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step() -> None:
        for start in range(0, len(pairs), at_once):
            part = slice(start, start + at_once)
            batch = torch.cat([chosen[part], rejected[part]])
            kept = case.completion + 1
            logits = policy(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False,
                            logits_to_keep=kept).logits[:, :-1]  # fmt: skip
            targets = batch[:, -case.completion :].unsqueeze(2)
            sums = logits.float().log_softmax(-1).gather(2, targets).squeeze(2).sum(1) + case.completion
            ours, theirs = sums.chunk(2)
            loss = -torch.nn.functional.logsigmoid(BETA * (ours - theirs)).sum() / len(pairs)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _adapter_step(model: TreeModel, optimizer: MasterOptimizer, device: torch.device) -> float:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.gather_gradients()
    return measure.typical(lambda: optimizer.step(1e-5, 1.0), device)
