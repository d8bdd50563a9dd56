"""A small language model that adds, with a verifier: rounds of sampling and training make it right more often.

One-digit sums as characters, a Llama of 47,000 weights. It is first taught with half of the answers drawn at random,
so that it samples right and wrong ones of every sum; then every round samples, verifies, pairs a right answer with
wrong ones, scores the reference and trains through the loop of `prefpipe train`. Accuracy is that of fresh samples of
the same hundred sums (3,200 samples: a standard error below one point): it says that the policy moved where the
verifier pulls, not that the model can add numbers that it has not seen.

Training amplifies the rounding of a CPU until two kinds of CPU train two different models, as two seeds do. A seed is
therefore one draw, and the limits below lie about half way to the smallest effect that was measured. One seed by
default; three with PREFPIPE_ALL_PROOFS=1 (`make proofs`).
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prefpipe.forward import attention
from prefpipe.forward.layout import Tree
from prefpipe.forward.logps import TreeModel, score
from prefpipe.stages.train import loop
from prefpipe.stages.train.examples import Ids, TrainPair
from prefpipe.stages.train.monitor.alerts import RULES
from prefpipe.stages.train.monitor.diagnostics import Facts, State, after_step
from tests.stages.train import data

CHARACTERS = "0123456789+=$"
END, PAD = CHARACTERS.index("$"), len(CHARACTERS)
SUMS = [(a, b) for a in range(10) for b in range(10)]
RIGHT_SHARE, LONGEST, EPOCHS = 0.5, 3, 2
SEEDS = range(3) if "PREFPIPE_ALL_PROOFS" in os.environ else range(1)


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
def sample(model: LlamaForCausalLM, count: int, seed: int) -> list[list[Ids]]:
    """`count` answers of every sum at temperature 1, up to their end or the longest length."""
    model.set_attn_implementation("sdpa")
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([prompt(s) for s in SUMS for _ in range(count)])
    start = tokens.shape[1]
    for _ in range(LONGEST):
        logits = model(input_ids=tokens, logits_to_keep=1).logits[:, -1]
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
    rows = [tuple(row[: row.index(END) + 1] if END in row else row) for row in tokens[:, start:].tolist()]
    return [rows[n * count : (n + 1) * count] for n in range(len(SUMS))]


def accuracy(model: LlamaForCausalLM) -> float:
    sampled = sample(model, 32, seed=9)
    return sum(given == answer(s) for s, own in zip(SUMS, sampled, strict=True) for given in own) / (32 * len(SUMS))


def pairs(model: LlamaForCausalLM, seed: int, *, flipped: bool = False) -> list[TrainPair]:
    """A right answer with up to four wrong ones of the same sum, and the log-probs of the model as the reference."""
    drawn = [
        (prompt(s), answer(s), wrong)
        for s, own in zip(SUMS, sample(model, 16, seed), strict=True)
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


@pytest.fixture(scope="module", params=SEEDS)
def taught(request: pytest.FixtureRequest) -> Taught:
    torch.set_num_threads(1)
    model = make(request.param)
    teach(model, request.param)
    return Taught(request.param, {k: v.clone() for k, v in model.state_dict().items()}, accuracy(model))


def series(model: LlamaForCausalLM, rows: Sequence[TrainPair], **changes: Any) -> list[dict[str, float]]:
    """All weights are trained; the metrics of every step."""
    config = data.config(
        Path(), train_batch_size=64, lr_scheduler_type="constant_with_warmup",
        **{"num_train_epochs": EPOCHS, "learning_rate": 5e-4, "beta": 0.1, "warmup_ratio": 0.0, **changes},
    )  # fmt: skip
    return [m.values for m in loop.steps(data.trainer(TreeModel(model), config), rows, 0)]


def train(model: LlamaForCausalLM, rows: Sequence[TrainPair], **changes: Any) -> dict[str, float]:
    """Metrics are means over the steps of the last epoch."""
    steps = series(model, rows, **changes)
    return mean(steps[-(len(steps) // changes.get("num_train_epochs", EPOCHS)) :])


def mean(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}


NLL: dict[str, Any] = {"loss_type": ("sigmoid", "nll"), "loss_weights": (1.0, 1.0)}


def test_three_rounds_with_a_verifier_raise_accuracy(taught: Taught):
    """The reference of a round is the policy that it starts from. At least 6 points in three rounds, and no round
    takes back more than two standard errors."""
    model, found = taught.model(), [taught.accuracy]
    for seed in range(3):
        train(model, pairs(model, seed), **NLL)
        found.append(accuracy(model))
    assert 0.15 < found[0] < 0.6
    assert all(after > before - 0.02 for before, after in pairwise(found))
    assert found[-1] >= found[0] + 0.06


def test_flipped_labels_lower_it(taught: Taught):
    model = taught.model()
    train(model, pairs(model, 0, flipped=True), beta=1.0)
    assert accuracy(model) <= taught.accuracy - 0.06


@dataclass(frozen=True)
class Long:
    """A long training: nats per token by which the chosen answers moved, the margin of the rewards (both over the last
    epoch), accuracy, and the alerts."""

    moved: float
    margin: float
    accuracy: float
    alerts: set[str]


@pytest.fixture(scope="module")
def trained_long(taught: Taught) -> dict[str, Long]:
    """beta 0.1 asks for 10 nats of answers of about 2.5 tokens, at twelve times the learning rate of the rounds above,
    after a warmup over a fifth of the steps: without one the first steps throw both runs off."""
    found: dict[str, Long] = {}
    for name, changes in (("plain", {}), ("nll", NLL)):
        model = taught.model()
        rows, epochs, rate = pairs(model, taught.seed), 6, 6e-3
        steps = series(model, rows, learning_rate=rate, num_train_epochs=epochs, warmup_ratio=0.2, **changes)
        last = mean(steps[-(len(steps) // epochs) :])
        tokens = sum(len(row.chosen) for row in rows) / len(rows)
        # The reference is the initial policy, so that A0 is looked at too.
        facts = Facts(len(steps), len(steps) // 5, beta=0.1, learning_rate=rate, exact=True)
        state = State()
        for step, values in enumerate(steps):
            state, _ = after_step(state, facts, RULES, step, values, skipped=False)
        found[name] = Long(
            last["rewards/chosen"] / 0.1 / tokens, last["rewards/margins"], accuracy(model),
            {alert.rule for alert in state.alerts},
        )  # fmt: skip
    return found


def test_plain_dpo_trained_long_displaces_and_the_nll_term_prevents_it(taught: Taught, trained_long: dict[str, Long]):
    """Without NLL the margin grows while both sides fall, and accuracy falls with the chosen one. With NLL the chosen
    one stays where it was, and accuracy rises. Measured over four seeds on AVX2: chosen -3.6 to -1.4 nats per token and
    accuracy -23 to -9 points without, -0.03 to 0.18 nats per token and 15 to 27 points with NLL."""
    plain, nll = trained_long["plain"], trained_long["nll"]
    assert plain.moved < -0.7
    assert plain.margin > 0.2
    assert plain.accuracy <= taught.accuracy - 0.04
    assert nll.moved > -0.3
    assert nll.margin > 0.2
    assert nll.accuracy >= taught.accuracy + 0.07


def test_the_alerts_of_displacement_fire_without_the_nll_term_and_not_with_it(trained_long: dict[str, Long]):
    """With NLL the chosen answers move by a few hundredths of a nat per token, down or up: A1 (they fall) fires in two
    seeds of four. That they collapsed (A2) or were displaced (A3) is said without NLL alone."""
    assert trained_long["plain"].alerts >= {"A1", "A2", "A3"}
    assert trained_long["nll"].alerts <= {"A1"}
