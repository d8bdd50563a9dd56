"""Many small rounds against few large ones at equal samples (semi-online against offline), on a model that adds.

    python benchmarks/semi_online.py --json docs/results/semi-online.json --table docs/results/semi-online.md

The model, its verifier and the training are those of tests/proofs/addition.py: DPO + NLL through the loop of
`prefpipe train`, the reference of a round is the policy that it starts from. A large round samples 16 answers to each
of 100 sums; a small one 16 answers to 10 of them, every sum in each ten rounds. Accuracy is that of 3,200 fresh
samples: a standard error below one point.
"""

import argparse
import json
import math
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.proofs.addition import SAMPLES, SUMS, rounds, taught_model

PARTS = 10  # small rounds in place of a large one
COMMAND = "python benchmarks/semi_online.py --json docs/results/semi-online.json --table docs/results/semi-online.md"


def main() -> None:
    """Run both ways for every seed, write the figures and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--large", type=int, default=5, help="large rounds; small ones are ten times as many")
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        taught = taught_model(seed)
        for way, count, parts in (("offline", arguments.large, 1), ("semi-online", arguments.large * PARTS, PARTS)):
            began = time.process_time()
            found = rounds(taught, count, parts)
            step = SAMPLES * len(SUMS) // parts
            curve = [{"samples": step * n, "accuracy": round(value, 4)} for n, value in enumerate(found)]
            seconds = round(time.process_time() - began, 1)
            runs.append({"way": way, "seed": seed, "rounds": count, "cpu_seconds": seconds, "curve": curve})
            arguments.json.write_text(json.dumps(figures(runs), indent=1) + "\n")
            print(f"seed {seed}, {way}: {found[0]:.1%} -> {found[-1]:.1%} in {seconds} s of CPU", flush=True)
    lines = table(runs)
    print("\n".join(lines))
    if arguments.table:
        arguments.table.write_text("\n".join([*head(runs), *lines, ""]))


def command(runs: list[dict[str, Any]]) -> str:
    """What makes these runs again."""
    return f"{COMMAND} --seeds {len({run['seed'] for run in runs})} --large {runs[0]['rounds']}"


def head(runs: list[dict[str, Any]]) -> list[str]:
    """What stands above the table."""
    large = runs[0]["rounds"]
    return f"""# Semi-online: many small rounds against few large ones

The addition model of `tests/proofs/addition.py` (47,000 weights), DPO + NLL, the previous policy as reference. Both
ways sample equally often, 16 answers to a sum: large rounds ({large}) of 100 sums, or small ones ({large * PARTS}) of
10. Each cell is the share of right answers among 3,200 fresh samples; the last column is semi-online minus offline in
points, with the interval that the fresh samples leave. The curves are in [semi-online.json](semi-online.json).

    {command(runs)}
""".split("\n")


def figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the JSON holds; it is written after every run."""
    return {
        "command": command(runs),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "fresh_samples_per_point": 32 * len(SUMS),
        "runs": runs,
    }


def table(runs: list[dict[str, Any]]) -> list[str]:
    """Accuracy by samples at the ends of the large rounds, and the mean difference over seeds with its interval."""
    ends = [point["samples"] for point in runs[0]["curve"]]
    names = [f"{run['way']}, seed {run['seed']}" for run in runs]
    lines = ["| samples | " + " | ".join(names) + " | difference [95 %] |", "| ---: |" + " ---: |" * (len(runs) + 1)]
    for samples in ends:
        at = [next(p["accuracy"] for p in run["curve"] if p["samples"] == samples) for run in runs]
        cells = " | ".join(f"{value:.1%}" for value in at)
        lines.append(f"| {samples:,} | {cells} | {_difference(at[0::2], at[1::2])} |")
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
