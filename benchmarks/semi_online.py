"""Many small rounds against few large ones at equal samples (semi-online against offline), on a model that adds.

    python benchmarks/semi_online.py --json docs/results/semi-online.json --table docs/results/semi-online.md

The model, its verifier and the training are those of tests/proofs/addition.py: DPO + NLL through the loop of
`prefpipe train`, the reference of a round is the policy that it starts from. A large round samples 16 answers to each
of 100 sums; a small one 16 answers to 10 of them, every sum in each ten rounds. Two ways are compared at as many
samples and as many visits of a pair: with its round alone, and with a replay of the rounds before it. Accuracy is that
of 3,200 fresh samples: a standard error below one point. Runs that stand in the JSON are kept; without it all are made
anew.
"""

import argparse
import json
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.proofs.addition import SAMPLES, SUMS, rounds, taught_model

PARTS = 10  # small rounds in place of a large one
COMMAND = "python benchmarks/semi_online.py --json docs/results/semi-online.json --table docs/results/semi-online.md"


@dataclass(frozen=True)
class Way:
    """How the samples are used: rounds in place of a large one, epochs of a round, and the share of the pairs of the
    `newest` rounds before it that a round trains on too; the optimizer of a round is a new one, or `goes_on`."""

    name: str
    parts: int
    epochs: int
    replay: float = 0.0
    newest: int = 0
    goes_on: bool = False

    @property
    def visits(self) -> float:
        """How often a pair is trained on, when all rounds are over that replay it."""
        return self.epochs * (1 + self.replay * self.newest)


WAYS = (
    Way("offline", 1, 2),
    Way("semi-online", PARTS, 2),
    Way("offline, 8 epochs", 1, 8),
    Way("semi-online, replay", PARTS, 1, replay=0.75, newest=PARTS - 1),
    Way("offline, 8 epochs, continued", 1, 8, goes_on=True),
    Way("semi-online, replay, continued", PARTS, 1, replay=0.75, newest=PARTS - 1, goes_on=True),
)
COMPARED = ((1, 0), (3, 2), (5, 2), (5, 3))  # places in WAYS


def main() -> None:
    """Run every way for every seed, write the figures and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--large", type=int, default=5, help="large rounds; small ones are ten times as many")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side, on one thread each")
    arguments = parser.parse_args()
    runs = kept(arguments)
    there = {(run["way"], run["seed"]) for run in runs}
    jobs = [(seed, way, arguments.large) for way, seed in product(WAYS, range(arguments.seeds))]
    missing = [job for job in jobs if (job[1].name, job[0]) not in there]
    with ProcessPoolExecutor(arguments.workers) as pool:
        for run in pool.map(measure, *zip(*missing, strict=True)) if missing else ():
            runs.append(run)
            arguments.json.write_text(json.dumps(figures(runs, arguments), indent=1) + "\n")
            ends = f"{run['curve'][0]['accuracy']:.1%} -> {run['curve'][-1]['accuracy']:.1%}"
            print(f"seed {run['seed']}, {run['way']}: {ends} in {run['cpu_seconds']} s of CPU", flush=True)
    lines = table(runs)
    print("\n".join(lines))
    if arguments.table:
        arguments.table.write_text("\n".join([*head(arguments), *lines, ""]))


def kept(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs that a file of before has, of as many large rounds: they are not made again."""
    if not arguments.json.exists():
        return []
    rounds_of = {way.name: arguments.large * way.parts for way in WAYS}
    found: list[dict[str, Any]] = json.loads(arguments.json.read_text())["runs"]
    return [run for run in found if rounds_of.get(run["way"]) == run["rounds"] and run["seed"] < arguments.seeds]


def measure(seed: int, way: Way, large: int) -> dict[str, Any]:
    """One run: accuracy by samples."""
    taught, began = taught_model(seed), time.process_time()
    count = large * way.parts
    found = rounds(
        taught, count, way.parts, replay=way.replay, newest=way.newest, epochs=way.epochs, goes_on=way.goes_on
    )
    step = SAMPLES * len(SUMS) // way.parts
    return {
        "way": way.name,
        "seed": seed,
        "rounds": count,
        "cpu_seconds": round(time.process_time() - began, 1),
        "curve": [{"samples": step * n, "accuracy": round(value, 4)} for n, value in enumerate(found)],
    }


def command(arguments: argparse.Namespace) -> str:
    """What makes these runs again."""
    return f"{COMMAND} --seeds {arguments.seeds} --large {arguments.large}"


def head(arguments: argparse.Namespace) -> list[str]:
    """What stands above the table."""
    large, (*_, replayed) = arguments.large, WAYS
    return f"""# Semi-online: many small rounds against few large ones

The addition model of `tests/proofs/addition.py` (47,000 weights), DPO + NLL, the previous policy as reference.
All ways sample equally often, 16 answers to a sum: large rounds ({large}) of {len(SUMS)} sums, or small ones
({large * PARTS}) of {len(SUMS) // PARTS}. Without replay a round trains {WAYS[0].epochs} epochs.
With it a small round trains {replayed.epochs} epoch on its pairs and on {replayed.replay:.0%} of those of the
{replayed.newest} rounds before, scored anew: a pair is visited {replayed.visits:g} times, so that its measure is
offline with {WAYS[2].epochs} epochs. Where a way is continued, its rounds begin with the optimizer of the round
before (`optimizer = "continue"` of iterate), else with a new one. A cell is the share of right answers among 3,200
fresh samples, the mean over seeds and each seed; a difference has the interval that the fresh samples leave. The curves
of every round are in [semi-online.json](semi-online.json).

    {command(arguments)}
""".split("\n")


def figures(runs: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """What the JSON holds; it is written after every run."""
    return {
        "command": command(arguments),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "fresh_samples_per_point": 32 * len(SUMS),
        "ways": [{**asdict(way), "visits": way.visits} for way in WAYS],
        "runs": runs,
    }


def table(runs: list[dict[str, Any]]) -> list[str]:
    """Accuracy by samples at the ends of the large rounds, as means over seeds with each seed behind them, and the
    differences of the ways that are compared, with intervals."""
    names = [way.name for way in WAYS]
    differences = [f"{names[small]} - {names[large]}, points [95 %]" for small, large in COMPARED]
    lines = ["| samples | " + " | ".join([*names, *differences]) + " |"]
    lines.append("| ---: |" + " ---: |" * (len(WAYS) + len(COMPARED)))
    for samples in [point["samples"] for point in runs[0]["curve"]]:
        at = [
            [p["accuracy"] for run in runs if run["way"] == name for p in run["curve"] if p["samples"] == samples]
            for name in names
        ]
        cells = [f"{sum(found) / len(found):.1%} ({', '.join(f'{value:.1%}' for value in found)})" for found in at]
        cells += [_difference(at[large], at[small]) for small, large in COMPARED]
        lines.append(f"| {samples:,} | {' | '.join(cells)} |")
    return lines


def _difference(offline: list[float], small: list[float]) -> str:
    """Mean of semi-online minus offline over seeds, in points, with the interval of the normal approximation from the
    3,200 samples of each point."""
    n = len(offline)
    mean = sum(b - a for a, b in zip(offline, small, strict=True)) / n
    error = math.sqrt(sum(p * (1 - p) for p in (*offline, *small)) / (32 * len(SUMS))) / n
    return f"{100 * mean:+.1f} [{100 * (mean - 1.96 * error):+.1f}, {100 * (mean + 1.96 * error):+.1f}]"


if __name__ == "__main__":
    main()
