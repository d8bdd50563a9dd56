"""A sweep of 12 variants against 12 separate runs of `train`, on the shipped pairs.

    python benchmarks/sweep.py [--rows N] [--model MODEL] --json FILE

Both sides do the same: their adapters are compared byte by byte. Half of the separate runs come before the sweep and
half behind it, so that a machine that gets busier favours neither. CPU seconds are those of the processes and their
children. Settings: one epoch of the rows, LoRA r = 16 on all linear layers, float32, a tenth of the prompts held out.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOAL = 0.75
BETAS, LOSSES, RATES = ("0.03", "0.1", "0.3"), ("sigmoid", "ipo"), ("1e-05", "3e-05")


def main() -> None:
    """Run both sides, print one line, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=72, help="of data/pairs.jsonl")
    parser.add_argument("--scored", action="store_true", help="score the rows first: the reference is then cached")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), arguments.model, arguments.rows, scored=arguments.scored)
    for figure in figures:
        print(f"{figure['name']}: {figure['figure']:.2f} (goal {GOAL}): {figure['detail']}")
    arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def measure(folder: Path, model: str, rows: int, *, scored: bool) -> list[dict[str, object]]:
    """The ratios of CPU seconds and of wall time, sweep to separate runs."""
    pairs = folder / "pairs.jsonl"
    lines = (ROOT / "data" / "pairs.jsonl").read_text("utf-8").splitlines(keepends=True)
    pairs.write_text("".join(lines[:rows]), "utf-8")
    if scored:
        inputs = ["--inputs", str(pairs), "--engine", "transformers", "--check", "0", "--dtype", "float32"]
        run("score", "--model", model, *inputs, "--out", str(folder / "scored"))
        pairs = folder / "scored"
    common = ["--model", model, "--pairs", str(pairs), "--dtype", "float32", "--eval-split", "0.1"]
    variants = [(beta, loss, rate) for beta in BETAS for loss in LOSSES for rate in RATES]
    alone: list[tuple[float, float]] = []
    swept = (0.0, 0.0)
    for number, (beta, loss, rate) in enumerate(variants):
        if number == len(variants) // 2:
            grid = [f"beta={','.join(BETAS)}", f"loss_type={','.join(LOSSES)}", f"learning_rate={','.join(RATES)}"]
            entries = [word for entry in grid for word in ("--grid", entry)]
            swept = run("sweep", *common, *entries, "--out", str(folder / "s"))
        settings = ["--beta", beta, "--loss-type", loss, "--learning-rate", rate]
        alone.append(run("train", *common, *settings, "--out", str(folder / f"{beta}-{loss}-{rate}")))
    for beta, loss, rate in variants:
        name = f"beta-{beta}__loss_type-{loss}__learning_rate-{rate}"
        weights = "adapter/adapter_model.safetensors"
        ours, theirs = folder / "s" / "variants" / name / weights, folder / f"{beta}-{loss}-{rate}" / weights
        if ours.read_bytes() != theirs.read_bytes():
            raise SystemExit(f"{name} is not the run that train makes alone")
    figures: list[dict[str, object]] = []
    for place, unit in enumerate(("CPU", "wall")):
        total = sum(times[place] for times in alone)
        figures.append(
            {"name": f"12 variants, {rows} pairs, {model}{', scored' if scored else ''}, {unit} time",
             "figure": swept[place] / total, "unit": "sweep / separate runs", "goal": GOAL,
             "holds": swept[place] / total <= GOAL, "detail": f"{swept[place]:.0f} s and {total:.0f} s",
             "command": f"python benchmarks/sweep.py --rows {rows}{' --scored' if scored else ''} --json FILE",
             "versions": {"torch": version("torch")}}
        )  # fmt: skip
    return figures


def run(*arguments: str) -> tuple[float, float]:
    """CPU seconds and seconds of a command."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(
        [sys.executable, "-P", "-m", "prefpipe", *arguments],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - start
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, seconds


if __name__ == "__main__":
    main()
