"""The model that adds: how it is made and taught, sampled, paired and trained. `test_addition` says what it is for."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prefpipe.forward import attention
from prefpipe.forward.layout import Tree
from prefpipe.forward.logps import TreeModel, score
from prefpipe.stages.train import loop
from prefpipe.stages.train.examples import Ids, TrainPair
from tests.stages.train import data

CHARACTERS = "0123456789+=$"
END, PAD = CHARACTERS.index("$"), len(CHARACTERS)
Sum = tuple[int, int]
SUMS: list[Sum] = [(a, b) for a in range(10) for b in range(10)]
SAMPLES = 16  # of every sum in a round
RIGHT_SHARE, LONGEST, EPOCHS = 0.5, 3, 2


def ids(text: str) -> Ids:
    return tuple(map(CHARACTERS.index, text))


def prompt(sum_: tuple[int, int]) -> Ids:
    return ids(f"{sum_[0]}+{sum_[1]}=")


def answer(sum_: tuple[int, int]) -> Ids:
    return ids(f"{sum_[0] + sum_[1]}$")


def make(seed: int) -> LlamaForCausalLM:
    attention.register()
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=PAD + 1, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=32, tie_word_embeddings=True, bos_token_id=PAD,
            eos_token_id=END, pad_token_id=PAD,
        )
    )  # fmt: skip


def teach(model: LlamaForCausalLM, seed: int, steps: int = 400) -> None:
    """Cross entropy on answers of which half are right and the others any number."""
    adamw, source = torch.optim.AdamW(model.parameters(), weight_decay=0.0), random.Random(seed + 1)
    for step in range(steps):
        adamw.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20) * (1 - step / steps) + 1e-5
        rows = [
            prompt(s) + (answer(s) if source.random() < RIGHT_SHARE else ids(f"{source.randrange(19)}$"))
            for s in source.choices(SUMS, k=128)
        ]
        width = max(map(len, rows))
        tokens = torch.tensor([row + (PAD,) * (width - len(row)) for row in rows])
        targets = tokens.masked_fill(tokens == PAD, -100)
        targets[:, : len(prompt(SUMS[0]))] = -100
        model(input_ids=tokens, labels=targets).loss.backward()
        adamw.step()
        adamw.zero_grad()


@torch.no_grad()
def sample(model: LlamaForCausalLM, count: int, seed: int, sums: Sequence[Sum] = SUMS) -> list[list[Ids]]:
    """`count` answers of every sum at temperature 1, up to their end or the longest length."""
    model.set_attn_implementation("sdpa")
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([prompt(s) for s in sums for _ in range(count)])
    start = tokens.shape[1]
    for _ in range(LONGEST):
        logits = model(input_ids=tokens, logits_to_keep=1).logits[:, -1]
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
    rows = [tuple(row[: row.index(END) + 1] if END in row else row) for row in tokens[:, start:].tolist()]
    return [rows[n * count : (n + 1) * count] for n in range(len(sums))]


def accuracy(model: LlamaForCausalLM) -> float:
    sampled = sample(model, 32, seed=9)
    return sum(given == answer(s) for s, own in zip(SUMS, sampled, strict=True) for given in own) / (32 * len(SUMS))


def pairs(model: LlamaForCausalLM, seed: int, *, flipped: bool = False, sums: Sequence[Sum] = SUMS) -> list[TrainPair]:
    """A right answer with up to four wrong ones of the same sum, and the log-probs of the model as the reference."""
    drawn = [
        (prompt(s), answer(s), wrong)
        for s, own in zip(sums, sample(model, SAMPLES, seed, sums), strict=True)
        if answer(s) in own
        for wrong in [given for given in own if given != answer(s)][:4]
    ]
    values = score(TreeModel(model), [Tree(p, (right, wrong)) for p, right, wrong in drawn])
    found: list[TrainPair] = []
    for n, ((p, right, wrong), (of_right, of_wrong)) in enumerate(zip(drawn, values, strict=True)):
        sides: list[Any] = [right, wrong, tuple(of_right), tuple(of_wrong)]
        if flipped:
            sides = [wrong, right, tuple(of_wrong), tuple(of_right)]
        found.append(TrainPair(str(n), f"{n}c", f"{n}r", p, *sides, 1.0))
    return found


@dataclass(frozen=True)
class Taught:
    """The weights after teaching, and how often they are right."""

    seed: int
    weights: dict[str, torch.Tensor]
    accuracy: float

    def model(self) -> LlamaForCausalLM:
        fresh = make(self.seed)
        fresh.load_state_dict(self.weights)
        return fresh


Moments = dict[str, torch.Tensor]  # the state of an optimizer


def series(
    model: LlamaForCausalLM, rows: Sequence[TrainPair], moments: Moments | None = None, **changes: Any
) -> list[dict[str, float]]:
    """All weights are trained; the metrics of every step. The optimizer goes on from `moments` and leaves its state
    there; without them, or where they are empty, it is a new one."""
    config = data.config(
        Path(), train_batch_size=64, lr_scheduler_type="constant_with_warmup",
        **{"num_train_epochs": EPOCHS, "learning_rate": 5e-4, "beta": 0.1, "warmup_ratio": 0.0, **changes},
    )  # fmt: skip
    trainer = data.trainer(TreeModel(model), config)
    if moments:
        trainer.optimizer.load_moments(moments)
    found = [m.values for m in loop.steps(trainer, rows, 0)]
    if moments is not None:
        moments.update(trainer.optimizer.state())
    return found


def train(
    model: LlamaForCausalLM, rows: Sequence[TrainPair], moments: Moments | None = None, **changes: Any
) -> dict[str, float]:
    """Metrics are means over the steps of the last epoch."""
    steps = series(model, rows, moments, **changes)
    return mean(steps[-(len(steps) // changes.get("num_train_epochs", EPOCHS)) :])


def mean(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}


NLL: dict[str, Any] = {"loss_type": ("sigmoid", "nll"), "loss_weights": (1.0, 1.0)}


def taught_model(seed: int) -> Taught:
    """A model after teaching; it computes on one thread, so that its numbers are the same on any number of cores."""
    torch.set_num_threads(1)
    model = make(seed)
    teach(model, seed)
    return Taught(seed, {k: v.clone() for k, v in model.state_dict().items()}, accuracy(model))


def rounds(
    taught: Taught, count: int, parts: int = 1, *, replay: float = 0.0, newest: int = 0, epochs: int = EPOCHS,
    goes_on: bool = False,
) -> list[float]:  # fmt: skip
    """Accuracy before training and after every round with DPO + NLL. The sums are dealt in `parts`, in random order:
    round k has the k-th part, and the first again when every part had its turn. The reference of a round is the policy
    that it starts from, also of the share `replay` of the pairs of the `newest` rounds before (0: of all). The
    optimizer is a new one in every round, or `goes_on`."""
    model, found, drawn = taught.model(), [taught.accuracy], list[list[TrainPair]]()
    dealt = SUMS if parts == 1 else random.Random(0).sample(SUMS, len(SUMS))
    moments: Moments | None = {} if goes_on else None
    for number in range(count):
        fresh = pairs(model, number, sums=dealt[number % parts :: parts])
        rows = [*fresh, *_scored_anew(model, _share(drawn[-newest:], replay, number))]
        drawn.append(fresh)
        if rows:
            train(model, rows, moments, **NLL, num_train_epochs=epochs)
        found.append(accuracy(model))
    return found


def _share(earlier: Sequence[Sequence[TrainPair]], share: float, seed: int) -> list[TrainPair]:
    """So large a share of the pairs of each round, drawn anew by the seed."""
    source = random.Random(seed)
    return [row for rows in earlier for row in source.sample(rows, round(share * len(rows)))]


def _scored_anew(model: LlamaForCausalLM, rows: Sequence[TrainPair]) -> list[TrainPair]:
    """Pairs of earlier rounds with the log-probs of the model as the reference."""
    values = score(TreeModel(model), [Tree(row.prompt_ids, (row.chosen, row.rejected)) for row in rows])
    return [
        replace(row, pair_id=f"earlier/{n}", ref_chosen=tuple(chosen), ref_rejected=tuple(rejected))
        for n, (row, (chosen, rejected)) in enumerate(zip(rows, values, strict=True))
    ]
