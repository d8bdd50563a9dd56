"""How time and memory grow: with the tokens of a micro-batch, with completions per prompt, with rows to score.

    python benchmarks/growth.py [--quick] --json FILE [--plot FILE.svg]

SmolLM2-135M in bfloat16 with LoRA, one thread, every point in a process of its own: CPU seconds of the second forward
and backward pass (of the whole pass for `rows`), and growth of resident memory over the loaded model.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from train_vs_trl import MODEL, ROOT

from prefpipe.memory import resident_peak
from prefpipe.stages.train import process_memory

# (what grows, its value, trees, prompt tokens, completions per prompt, completion tokens)
POINTS = (
    *(("tokens of a micro-batch", 320 * n, n, 192, 2, 64) for n in (1, 2, 4, 8)),
    *(("completions per prompt (K)", k, 1, 192, k, 64) for k in (2, 4, 8, 16)),
    *(("rows scored", 2 * n, n, 96, 2, 32) for n in (16, 64, 256)),
)


def main() -> None:
    """Measure every point, print a table, write the figures and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first point of each series")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, *shape = arguments.worker
        print(json.dumps(worker(kind, *map(int, shape))))
        return
    figures: list[dict[str, Any]] = []
    seen: set[str] = set()
    for kind, value, *shape in POINTS:
        if arguments.quick and kind in seen:
            continue
        seen.add(kind)
        found = run_worker(kind, shape)
        for name, unit in (("seconds", "CPU s"), ("growth", "MiB")):
            figures.append(
                {"name": f"{kind} = {value}: {name}", "figure": found[name], "unit": unit, "goal": None, "holds": None,
                 "series": kind, "x": value, "command": "python benchmarks/growth.py --json FILE",
                 "versions": {p: version(p) for p in ("torch", "transformers", "peft")}}
            )  # fmt: skip
        print(f"{kind:<28} {value:>6} {found['seconds']:>8.2f} s {found['growth']:>8.0f} MiB", flush=True)
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    if arguments.plot:
        plot(figures, arguments.plot)


def run_worker(kind: str, shape: list[int]) -> dict[str, float]:
    """One point in a fresh process with one thread."""
    command = [sys.executable, __file__, "--json", os.devnull, "--worker", kind, *map(str, shape)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def worker(kind: str, trees: int, prompt: int, completions: int, completion: int) -> dict[str, float]:
    """Train on one micro-batch, or score, and tell seconds and MiB."""
    import torch

    from prefpipe.forward import load
    from prefpipe.forward.layout import Tree
    from prefpipe.forward.logps import TreeModel, score
    from prefpipe.models import policy

    torch.set_num_threads(1)
    source = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(source.choices(range(100, 40000), k=count))

    base = load.load_model(policy.resolve(MODEL).directory, "bfloat16")
    model = TreeModel(load.add_lora(base, r=16, alpha=32, target_modules="all-linear", seed=0))
    data = [Tree(ids(prompt), tuple(ids(completion) for _ in range(completions))) for _ in range(trees)]
    start = process_memory.resident_memory()
    process_memory.restart_resident_peak()
    if kind == "rows scored":
        begin = time.process_time()
        for _ in score(model, data):
            pass
    else:
        for _ in range(2):
            begin = time.process_time()
            model(model.layout(data)).sum().backward()
    return {"seconds": time.process_time() - begin, "growth": (resident_peak() - start) / 2**20}


def plot(figures: list[dict[str, Any]], path: Path) -> None:
    """Six small charts: a series per column, seconds above memory."""
    import altair as alt

    rows = []
    for unit, title in (("CPU s", "CPU seconds"), ("MiB", "growth of memory, MiB")):
        charts = []
        for series in dict.fromkeys(f["series"] for f in figures):
            points = [{"x": f["x"], "y": f["figure"]} for f in figures if f["series"] == series and f["unit"] == unit]
            chart = alt.Chart(alt.Data(values=points)).mark_line(point=True).encode(
                x=alt.X("x:Q", title=series), y=alt.Y("y:Q", title=title, scale=alt.Scale(zero=True))
            )  # fmt: skip
            charts.append(chart.properties(width=200, height=150))
        rows.append(alt.hconcat(*charts))
    alt.vconcat(*rows).save(str(path))


if __name__ == "__main__":
    main()
