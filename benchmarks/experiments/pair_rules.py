"""Which pair rule teaches most by as many pairs?"""

from pathlib import Path
from typing import Any

import polars as pl

from experiments.bench import ONE_NAT, REWARD, Bench, Experiment, Hypothesis

RULES: dict[str, dict[str, Any]] = {
    "best-worst": {},
    "best-random-worse": {},
    "all-above-gap": {"rule_gap": 0.3, "pairs_per_prompt": 0},
}


def run(bench: Bench) -> None:
    """One round of DPO with beta 1 and learning rate 3e-4, on as many pairs by each rule: drawn from those that it
    makes of the same completions. The reward is how close the number is, in tenths; all-above-gap takes gaps from
    0.3 on."""
    for seed in bench.scale.seeds:
        start = bench.evaluated_start(seed)
        completions = bench.generate(f"seed-{seed}/generate", start, seed)
        files = _equal_pairs(bench, completions, seed)
        for rule, file in files.items():
            with bench.arm(rule, seed) as evaluations:
                model = bench.train(f"seed-{seed}/{rule}-train", start, pairs=[str(file)], seed=seed, **ONE_NAT)
                evaluations[seed] = bench.evaluate(f"seed-{seed}/{rule}-evaluate", model, seed)


def _equal_pairs(bench: Bench, completions: str, seed: int) -> dict[str, Path]:
    """A file of pairs for each rule, with as many rows as the rule with the fewest has."""
    drawn: dict[str, pl.DataFrame] = {}
    for rule, settings in RULES.items():
        run = bench.step(
            "build-pairs", f"seed-{seed}/{rule}", completions=[completions], reward=REWARD, rule=rule, seed=seed,
            gap_filter="none", format="trl", **settings,
        )  # fmt: skip
        drawn[rule] = pl.read_parquet(run / "trl" / "*.parquet", columns=["prompt", "chosen", "rejected"])
    count = min(map(len, drawn.values()))
    files = {rule: bench.out / f"seed-{seed}" / f"{rule}.jsonl" for rule in drawn}
    for rule, pairs in drawn.items():
        pairs.sample(count, seed=seed, shuffle=True).write_ndjson(files[rule])
    return files


HYPOTHESES = (
    *(Hypothesis("closeness", rule, 1, "start", "any rule helps") for rule in RULES),
    Hypothesis("kl", "best-worst", 1, "best-random-worse", "extremes exaggerate the reward: the policy goes further"),
    Hypothesis("closeness", "best-worst", 0, "best-random-worse", "this reward has no noise to exaggerate"),
    Hypothesis("closeness", "all-above-gap", 0, "best-random-worse", "as many pairs teach as much"),
)

EXPERIMENT = Experiment("Pair rules at n = 8, on as many pairs", run, HYPOTHESES, ("closeness", "sampled", "kl"))
