"""The experiments of `benchmarks/results.py` by name."""

from experiments import losses, pair_rules, references, rounds

EXPERIMENTS = {
    "references": references.EXPERIMENT,
    "losses": losses.EXPERIMENT,
    "rounds": rounds.EXPERIMENT,
    "pair-rules": pair_rules.EXPERIMENT,
}
