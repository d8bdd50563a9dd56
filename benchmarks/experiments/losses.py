"""How do six losses compare on the same completions?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import measures
from experiments.bench import NLL, RIGHT_WRONG, TRAINING, Bench, Experiment, Hypothesis

# Loss -> what it trains on, and its settings, with a beta that its unit makes sensible for answers of three tokens.
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "DPO": ("pairs", {"loss_type": ["sigmoid"], "beta": 1.0}),
    "DPO + NLL": ("pairs", {**NLL, "beta": 1.0}),
    "IPO": ("pairs", {"loss_type": ["ipo"], "beta": 0.25}),
    "KTO": ("labels", {"loss_type": ["kto"], "beta": 3.0, "train_batch_size": 2 * TRAINING["train_batch_size"]}),
    "SimPO": ("pairs", {"loss_type": ["simpo"], "beta": 2.0}),
    "ORPO": ("pairs", {"loss_type": ["orpo"], "beta": 0.3}),
}
RATES = (1e-4, 3e-4)


def run(bench: Bench) -> None:
    """One round of each loss on the same completions in as many steps; KTO reads them as labels. Each loss has the
    better of two learning rates, by right answers of a fourth policy to prompts of the split `validation`; that policy
    and these prompts are in no line of the table."""
    tuned_on = max(bench.scale.seeds) + 1
    rows = _pairs_and_labels(bench, tuned_on)
    best: dict[str, float] = {}
    for loss in LOSSES:
        passed = {
            rate: measures.mean("sampled", [_with_loss(bench, loss, rate, tuned_on, rows, "validation")]).value
            for rate in RATES[: bench.scale.trials]
        }
        best[loss] = max(passed, key=lambda rate: passed[rate])
    for seed in bench.scale.seeds:
        bench.evaluated_start(seed)
        rows = _pairs_and_labels(bench, seed)
        for loss, rate in best.items():
            with bench.arm(loss, seed, f"beta {LOSSES[loss][1]['beta']:g}, learning rate {rate:g}") as evaluations:
                evaluations[seed] = _with_loss(bench, loss, rate, seed, rows, "heldout")


def _pairs_and_labels(bench: Bench, seed: int) -> dict[str, str]:
    """The same completions as pairs and as labels."""
    completions = bench.generate(f"seed-{seed}/generate", bench.start(seed), seed)
    outputs = {"pairs": {}, "labels": {"output": "labels", "label_rule": "pairs"}}
    return {
        kind: str(bench.step("build-pairs", f"seed-{seed}/{kind}", completions=[completions], **RIGHT_WRONG, **output))
        for kind, output in outputs.items()
    }


def _with_loss(bench: Bench, loss: str, rate: float, seed: int, rows: Mapping[str, str], split: str) -> Path:
    """The evaluation of the start after training with a loss and a learning rate."""
    kind, settings = LOSSES[loss]
    here = f"seed-{seed}/{loss.replace(' ', '')}-{rate:g}"
    data = {kind: [rows[kind]], "seed": seed, "learning_rate": rate}
    model = bench.train(f"{here}-train", bench.start(seed), **settings, **data)
    return bench.evaluate(f"{here}-{split}", model, seed, split)


HYPOTHESES = (
    *(Hypothesis("sampled", loss, 1, "start", "one round helps with any loss") for loss in LOSSES),
    Hypothesis("sampled", "DPO + NLL", 1, "DPO", "the chosen side cannot fall"),
    *(Hypothesis("sampled", loss, 0, "DPO", "data move more than the loss does") for loss in ("IPO", "KTO", "ORPO")),
)

EXPERIMENT = Experiment("Six losses on the same completions", run, HYPOTHESES)
