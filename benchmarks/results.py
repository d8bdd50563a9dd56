"""What choices do to a policy, as experiments that run again by one command: reference, loss, rounds, pair rule.

    python benchmarks/results.py [references] [losses] [rounds] [pair-rules] [--quick] [--out DIR] [--docs DIR]

Each experiment is a module in `experiments/`. Every step is a command of prefpipe, called in this process; the same
command again goes on where it was interrupted. The task is `addition.py`. The hypotheses of an experiment are written
down before it runs, as differences with a sign, and its page says of each whether it held. An arm that fails stays in
the table, with its message.
"""

import argparse
import json
import subprocess
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from experiments import EXPERIMENTS, measures
from experiments.bench import QUICK, Arm, Bench, Scale
from experiments.page import SIGNS, page

ROOT = Path(__file__).resolve().parent.parent


def report(name: str, scale: Scale, arms: Sequence[Arm], seconds: float) -> dict[str, Any]:
    """The numbers of an experiment: of every arm, and of every hypothesis."""
    experiment, by_name = EXPERIMENTS[name], {arm.name: arm for arm in arms}
    hypotheses = [
        h._replace(arm=h.arm.format(last=scale.rounds), other=h.other.format(last=scale.rounds))
        for h in experiment.hypotheses
    ]
    return {
        "name": name,
        "title": experiment.title,
        "command": _command(name, scale),
        "commit": _commit(),
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "cpu_seconds": round(seconds),
        "scale": asdict(scale),
        "arms": [_line(arm, experiment.measures) for arm in arms],
        "hypotheses": [measures.judged(hypothesis, by_name) for hypothesis in hypotheses],
    }


def _line(arm: Arm, names: Sequence[str]) -> dict[str, Any]:
    """The line of an arm in the table, with each measure over all seeds and for each seed."""
    values = {
        measure: {
            **measures.mean(measure, list(arm.evaluations.values()))._asdict(),
            "seeds": {seed: measures.mean(measure, [evaluation]).value for seed, evaluation in arm.evaluations.items()},
        }
        for measure in names
        if arm.evaluations
    }
    return {"name": arm.name, "settings": arm.settings, "failures": arm.failures, **values}


def _command(name: str, scale: Scale) -> str:
    """The command line that gives the numbers again."""
    usual = QUICK if scale.prompts == QUICK.prompts else Scale()
    seeds = f" --seeds {' '.join(map(str, scale.seeds))}" if scale.seeds != usual.seeds else ""
    return f"python benchmarks/results.py {name}{' --quick' if usual == QUICK else ''}{seeds}"


def _commit() -> str:
    """The commit of the checkout, marked where the code differs from it."""

    def git(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)

    changed = git("diff", "--quiet", "HEAD", "--", "prefpipe", "benchmarks").returncode
    return git("rev-parse", "HEAD").stdout.strip() + (" with changes" if changed else "")


def run(name: str, scale: Scale, out: Path, docs: Path) -> dict[str, Any]:
    """Run an experiment and write its numbers and its page into `docs`."""
    bench, clock = Bench(out, name, scale), out / name / "cpu_seconds"
    before = float(clock.read_text()) if clock.exists() else 0.0  # of runs that were interrupted
    try:
        with (out / f"{name}.log").open("a") as log, redirect_stderr(log):
            EXPERIMENTS[name].run(bench)
    finally:
        seconds = before + time.process_time()
        clock.write_text(str(seconds))
    found = report(name, scale, bench.arms, seconds)
    docs.mkdir(parents=True, exist_ok=True)
    (docs / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (docs / f"{name}.md").write_text(page(found))
    return found


def main() -> None:
    """Run the experiments that are named, or all of them, and print whether their hypotheses held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--quick", action="store_true", help="one seed and few rows: a look at what would run")
    parser.add_argument("--seeds", type=int, nargs="+", help="the draws of everything random (0 1 2)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "results")
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else Scale()
    if arguments.seeds:
        scale = replace(scale, seeds=tuple(arguments.seeds))
    for name in arguments.names or EXPERIMENTS:
        if name not in EXPERIMENTS:
            parser.error(f"no experiment '{name}'; there are {', '.join(EXPERIMENTS)}")
        found = run(name, scale, arguments.out, arguments.docs)
        print(
            "\n".join(
                f"{h['outcome']}: {h['measure']}, {h['arm']} {SIGNS[h['sign']]} {h['other']}"
                for h in found["hypotheses"]
            )
        )


if __name__ == "__main__":
    main()
