"""A sweep of 12 variants against 12 separate runs of `train`, on the shipped pairs.

    python benchmarks/sweep.py [--rows N] [--model MODEL] [--jobs N] --json FILE

Both sides do the same: their adapters are compared byte by byte. Half of the separate runs come before the sweep and
half behind it, so that a machine that gets busier favours neither. CPU seconds are those of the processes and their
children. With --jobs N separate runs go N at a time, and wall time is left out: it would compare unlike things.
Settings: one epoch of the rows, LoRA r = 16 on all linear layers, float32, a tenth of the prompts held out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
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
    parser.add_argument("--jobs", type=int, default=1, help="separate runs at a time")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), arguments.model, arguments.rows, arguments.jobs, scored=arguments.scored)
    for figure in figures:
        print(f"{figure['name']}: {figure['figure']:.2f} (goal {GOAL}): {figure['detail']}")
    arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def measure(folder: Path, model: str, rows: int, jobs: int, *, scored: bool) -> list[dict[str, object]]:
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
    grid = [f"beta={','.join(BETAS)}", f"loss_type={','.join(LOSSES)}", f"learning_rate={','.join(RATES)}"]

    def train(variant: tuple[str, str, str]) -> tuple[float, float]:
        beta, loss, rate = variant
        settings = ["--beta", beta, "--loss-type", loss, "--learning-rate", rate]
        return run("train", *common, *settings, "--out", str(folder / "-".join(variant)))

    with ThreadPoolExecutor(jobs) as pool:
        alone = list(pool.map(train, variants[:6]))
        swept = run(
            "sweep", *common, *(word for entry in grid for word in ("--grid", entry)), "--out", str(folder / "s")
        )
        alone += pool.map(train, variants[6:])
    for beta, loss, rate in variants:
        name = f"beta-{beta}__loss_type-{loss}__learning_rate-{rate}"
        weights = "adapter/adapter_model.safetensors"
        ours, theirs = folder / "s" / "variants" / name / weights, folder / f"{beta}-{loss}-{rate}" / weights
        if ours.read_bytes() != theirs.read_bytes():
            raise SystemExit(f"{name} is not the run that train makes alone")
    figures: list[dict[str, object]] = []
    for place, unit in enumerate(("CPU", "wall") if jobs == 1 else ("CPU",)):
        total = sum(times[place] for times in alone)
        figures.append(
            {"name": f"12 variants, {rows} pairs, {model}{', scored' if scored else ''}, {unit} time",
             "figure": swept[place] / total, "unit": "sweep / separate runs", "goal": GOAL,
             "holds": swept[place] / total <= GOAL, "detail": f"{swept[place]:.0f} s and {total:.0f} s",
             "command": f"python benchmarks/sweep.py --rows {rows} --jobs {jobs} --json FILE" + " --scored" * scored,
             "versions": {"torch": version("torch")}}
        )  # fmt: skip
    return figures


def run(*arguments: str) -> tuple[float, float]:
    """CPU seconds and seconds of a command."""
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "prefpipe", *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    _, status, used = os.wait4(process.pid, 0)  # with its children
    if status:
        raise SystemExit(f"{arguments[0]} failed with status {status}")
    return used.ru_utime + used.ru_stime, time.monotonic() - start


if __name__ == "__main__":
    main()
