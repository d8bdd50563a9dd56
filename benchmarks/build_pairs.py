"""build-pairs at scale: selection beside the same rule in bare polars, pandas and HF datasets; then the whole stage.

    python benchmarks/build_pairs.py [--quick] [--prompts N] [--workers N] [--only NAME] --json FILE

Rows are generated: prompts with 8 candidates of about 100 tokens, rewards with ties, reference log-probs. Every
measurement runs in a process of its own; times are wall-clock seconds, memory is the peak resident set of the process.
The peers get the key columns (prompt_id, completion_id, reward, num_tokens, finish_reason) as one Parquet file, and so
do we; HF datasets is measured on a twentieth of the prompts and scaled. `--quick` makes 1/50 of the rows, `--prompts`
another number of them. `--workers` is the setting of build-pairs.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
PROMPTS, EACH, SHARD = 1_250_000, 8, 25_000
QUICK, PART_OF_HF = 50, 20
GOALS = {"selection": 10.0, "ratio": 1.5, "stage": 240.0, "memory": 6.0}
ORDER = ["prompt_id", "reward", "completion_id"]
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
PEERS = ("ours", "polars", "pandas", "datasets")


def main() -> None:
    """Make the rows, measure, print one table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"1/{QUICK} of the rows")
    parser.add_argument("--prompts", type=int, default=0, help=f"prompts with {EACH} candidates each")
    parser.add_argument("--workers", type=int, default=1, help="processes of the whole stage")
    parser.add_argument("--only", choices=("selection", "stage"), help="one half of it")
    parser.add_argument("--keep", type=Path, help="make the rows here and leave them (about 12 GB), or use them again")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        name, folder = arguments.worker
        function = partial(whole_stage, workers=arguments.workers) if name == "stage" else WORKERS[name]
        measure(function, Path(folder), arguments.json)
        return
    num_prompts = arguments.prompts or (PROMPTS // QUICK if arguments.quick else PROMPTS)
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="prefpipe-"))
    try:
        if not (folder / "run" / "manifest.json").exists():
            make_rows(folder, num_prompts)
        figures = [*(selection(folder) if arguments.only != "stage" else [])]
        figures += stage(folder, arguments.workers) if arguments.only != "selection" else []
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)
    size = "--quick " if arguments.quick else f"--prompts {arguments.prompts} " if arguments.prompts else ""
    command = f"python benchmarks/build_pairs.py {size}--workers {arguments.workers} --json FILE"
    versions = {p: version(p) for p in ("polars", "pyarrow", "pandas", "datasets")} | {"cpus": str(os.cpu_count())}
    rows = [{**f, "command": command, "versions": versions} for f in figures]
    arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"{num_prompts:,} prompts x {EACH} candidates")
    print("| what | figure | goal | holds |\n|---|---|---|---|")
    for f in figures:
        goal, holds = ("", "") if f["goal"] is None else (f"{f['goal']:g} {f['unit']}", "yes" if f["holds"] else "no")
        print(f"| {f['name']} | {f['figure']:.2f} {f['unit']} | {goal} | {holds} |")


def selection(folder: Path) -> list[dict[str, Any]]:
    """The rule best-worst on the key columns, ours and the peers'."""
    found = {name: work(name, folder) for name in PEERS}
    same = {name: found[name]["digest"] == found["ours"]["digest"] for name in ("polars", "pandas")}
    if not all(same.values()):
        raise SystemExit(f"the peers select other pairs: {same}")
    seconds = {n: f["seconds"] * (PART_OF_HF if n == "datasets" else 1) for n, f in found.items()}
    lines = [figure("selection, ours", seconds["ours"], "s", GOALS["selection"])]
    lines += [figure(f"selection, {name}", seconds[name], "s") for name in PEERS[1:]]
    ratio = seconds["ours"] / seconds["polars"]
    return [*lines, figure("selection, ours / bare polars", ratio, "x", GOALS["ratio"])]


def stage(folder: Path, workers: int) -> list[dict[str, Any]]:
    """The whole stage with defaults, token ids and log-probs; checking digests is reported apart."""
    whole, check = work("stage", folder, "--workers", str(workers)), work("verification", folder)
    return [
        figure("verification of the inputs (part of the stage)", check["seconds"], "s"),
        figure("whole stage", whole["seconds"], "s", GOALS["stage"]),
        figure("whole stage, CPU seconds of all cores", whole["cpu"], "s"),
        figure("peak memory of its largest process", whole["gb"], "GB", GOALS["memory"]),
        figure("pairs written", whole["digest"], "pairs"),
    ]


def figure(name: str, value: float, unit: str, goal: float | None = None) -> dict[str, Any]:
    """One line of the table."""
    return {"name": name, "figure": value, "unit": unit, "goal": goal, "holds": goal is None or value <= goal}


def work(name: str, folder: Path, *flags: str) -> dict[str, Any]:
    """Measure one worker in a process of its own."""
    out = folder / "worker.json"
    command = [sys.executable, __file__, "--json", str(out), "--worker", name, str(folder), *flags]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return json.loads(out.read_text())


def measure(function: Callable[[Path], Any], folder: Path, out: Path) -> None:
    """Run a worker; imports come before the clock starts, and so does nothing else."""
    start = time.perf_counter()
    result = function(folder)
    seconds, digest = result if isinstance(result, tuple) else (time.perf_counter() - start, result)
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu, largest = sum(u.ru_utime + u.ru_stime for u in used), max(u.ru_maxrss for u in used)
    measured = {"seconds": seconds, "cpu": cpu, "gb": largest * 1024 / 1e9}
    out.write_text(json.dumps({**measured, "digest": digest}))


def ours(folder: Path) -> tuple[float, int]:
    """Rank, rule and pair columns, from the Parquet file on."""
    import polars as pl

    from prefpipe.config.build_pairs import BuildPairsConfig
    from prefpipe.stages.build_pairs import pair_rules

    start = time.perf_counter()
    ranked = pair_rules.rank(pl.read_parquet(folder / "keys.parquet"))
    pairs = pair_rules.pair_frame(ranked, pair_rules.best_worst(ranked, BuildPairsConfig(rule="best-worst")))
    return time.perf_counter() - start, _digest(pairs["chosen_completion_id"], pairs["rejected_completion_id"])


def bare_polars(folder: Path) -> tuple[float, int]:
    """What a user of polars writes for the same pairs: sort, first and last of each group."""
    import polars as pl

    start = time.perf_counter()
    pairs = (
        pl.scan_parquet(folder / "keys.parquet")
        .sort(ORDER, descending=[False, True, False])
        .group_by("prompt_id", maintain_order=True)
        .agg(
            pl.exclude("prompt_id").first().name.prefix("chosen_"),
            pl.exclude("prompt_id").last().name.prefix("rejected_"),
        )
        .with_columns(reward_gap=pl.col("chosen_reward") - pl.col("rejected_reward"))
        .filter(pl.col("reward_gap") > 0)
        .collect()
    )
    return time.perf_counter() - start, _digest(pairs["chosen_completion_id"], pairs["rejected_completion_id"])


def with_pandas(folder: Path) -> tuple[float, int]:
    """The same in pandas."""
    import pandas as pd
    import polars as pl

    start = time.perf_counter()
    rows = pd.read_parquet(folder / "keys.parquet").sort_values(ORDER, ascending=[True, False, True])
    groups = rows.groupby("prompt_id", sort=False)
    pairs = groups.first().add_suffix("_chosen").join(groups.last().add_suffix("_rejected"))
    pairs = pairs[pairs["reward_chosen"] > pairs["reward_rejected"]]
    seconds = time.perf_counter() - start
    return seconds, _digest(*(pl.Series(pairs[f"completion_id_{s}"].to_numpy()) for s in ("chosen", "rejected")))


def with_datasets(folder: Path) -> tuple[float, int]:
    """The same in HF datasets, on a twentieth of the prompts: sort, then one pass over batches of a prompt's rows."""
    import datasets

    datasets.disable_progress_bars()
    cache = folder / "hf"
    few = folder / "few.parquet"
    table = pq.read_table(folder / "keys.parquet")
    few_rows = table.num_rows // PART_OF_HF // EACH * EACH
    pq.write_table(table.slice(0, few_rows), few)  # the file is grouped by prompt
    start = time.perf_counter()
    rows = datasets.Dataset.from_parquet(str(few), cache_dir=str(cache))
    rows = rows.sort(ORDER, reverse=[False, True, False])

    def pair(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if batch["reward"][0] <= batch["reward"][-1]:
            return {name: [] for name in ("prompt_id", "chosen", "rejected", "reward_gap")}
        return {
            "prompt_id": [batch["prompt_id"][0]],
            "chosen": [batch["completion_id"][0]],
            "rejected": [batch["completion_id"][-1]],
            "reward_gap": [batch["reward"][0] - batch["reward"][-1]],
        }

    pairs = rows.map(pair, batched=True, batch_size=EACH, remove_columns=rows.column_names)
    seconds = time.perf_counter() - start
    shutil.rmtree(cache, ignore_errors=True)
    return seconds, len(pairs)


def whole_stage(folder: Path, workers: int = 1) -> int:
    """`prefpipe build-pairs --completions RUN --rule best-random-worse`, in process."""
    from prefpipe.config.build_pairs import BuildPairsConfig
    from prefpipe.stages import build_pairs

    out = folder / "pairs"
    shutil.rmtree(out, ignore_errors=True)
    config = BuildPairsConfig(completions=(str(folder / "run"),), reward="mine:reward", workers=workers)
    manifest = build_pairs.run(config, out, force=False)
    for line in build_pairs.summary(manifest, out):
        print(line, file=sys.stderr)
    return int(manifest["totals"]["pairs"])


def verification(folder: Path) -> int:
    """Digests of every input file, as the stage checks them."""
    from prefpipe.runs import store
    from prefpipe.schemas import Completion, Prompt, RefLogps, Reward

    names = ("completions", "prompts", "rewards/mine:reward", "ref_logps")
    types = (Completion, Prompt, Reward, RefLogps)
    return sum(len(store.scannable_files(folder / "run", n, t)) for n, t in zip(names, types, strict=True))


WORKERS: dict[str, Callable[[Path], Any]] = {
    "ours": ours,
    "polars": bare_polars,
    "pandas": with_pandas,
    "datasets": with_datasets,
    "stage": whole_stage,
    "verification": verification,
}


def make_rows(folder: Path, num_prompts: int) -> None:
    """A complete run of generate with random content, and the key columns in one file."""
    from prefpipe.config.generate import GenerateConfig
    from prefpipe.runs import store
    from prefpipe.schemas import Completion, Prompt, RefLogps, Reward

    source = np.random.default_rng(0)
    words = " ".join("".join(source.choice(list("abcdefghijklmnopqrstuvwxyz"), 4)) for _ in range(200_000)).encode()
    keys: list[pa.Table] = []
    shard = min(SHARD, num_prompts // 2)
    with store.open_run(folder / "run", "generate", GenerateConfig(), {"made": str(num_prompts)}, force=False) as run:
        for number in range(num_prompts // shard):
            prompts = _ids(source, shard)
            rows = _shard(source, prompts, words)
            start = number * shard
            messages = [[{"role": "user", "content": f"Question {start + i}: what is that?"}] for i in range(shard)]
            constant = {
                n: pa.array([v] * shard, pa.string()) for n, v in (("split", "train"), ("source", ""), ("meta", "{}"))
            }
            columns = {"prompt_id": prompts, "messages": pa.array(messages, MESSAGES), **constant}
            run.write_part("prompts", Prompt, number, _table(Prompt, columns))
            for dataset, row_type in (
                ("ref_logps", RefLogps),
                ("rewards/mine:reward", Reward),
                ("completions", Completion),
            ):
                run.write_part(dataset, row_type, number, _table(row_type, rows))
            keys.append(
                pa.table({n: rows[n] for n in ("prompt_id", "completion_id", "reward", "num_tokens", "finish_reason")})
            )
        run.finish({}, {})
    pq.write_table(pa.concat_tables(keys), folder / "keys.parquet")


def _shard(source: np.random.Generator, prompts: pa.Array, words: bytes) -> dict[str, pa.Array]:
    """Columns of one shard, EACH rows per prompt."""
    count = len(prompts) * EACH
    lengths = source.integers(50, 151, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = source.integers(3, 49152, offsets[-1], dtype=np.int32)
    tokens[offsets[1:] - 1] = 2
    logps = -source.random(offsets[-1], dtype=np.float32) * 4
    prompt_tokens = source.integers(3, 49152, (len(prompts), 20), dtype=np.int32)
    prompt_tokens[:, -3:] = (1, 9, 8)
    text_offsets = (offsets * 4).astype(np.int32)  # about four characters per token
    whole, need = np.frombuffer(words, np.uint8), int(text_offsets[-1])
    texts = np.resize(np.roll(whole, -int(source.integers(len(whole)))), need)

    def same(value: str) -> pa.Array:
        return pa.array([value], pa.string()).take(pa.array(np.zeros(count, np.int8)))

    return {
        "prompt_id": prompts.take(pa.array(np.repeat(np.arange(len(prompts)), EACH))),
        "completion_id": _ids(source, count),
        "sample_index": pa.array(np.tile(np.arange(EACH, dtype=np.int32), len(prompts))),
        "text": pa.StringArray.from_buffers(count, pa.py_buffer(text_offsets), pa.py_buffer(texts.tobytes())),
        "prompt_token_ids": _lists(
            np.arange(count + 1, dtype=np.int32) * 20, np.repeat(prompt_tokens, EACH, axis=0).ravel()
        ),
        "token_ids": _lists(offsets, tokens),
        "finish_reason": pa.array(np.where(source.random(count) < 0.03, "length", "stop")),
        "policy": same("weights:made"),
        "ids_digest": _ids(source, count),
        "reference": same("weights:made"),
        "scorer": same("made-1"),
        "token_logps": _lists(offsets, logps),
        "ref_logps": pa.array(np.add.reduceat(logps, offsets[:-1])),
        "num_tokens": pa.array(lengths.astype(np.int32)),
        "name": same("mine:reward"),
        "reward": pa.array(source.normal(size=count).round(2)),
        "status": same("ok"),
        "detail": pa.nulls(count, pa.string()),
    }  # fmt: skip


def _ids(source: np.random.Generator, count: int) -> pa.Array:
    """Random ids of 32 hex digits."""
    offsets = np.arange(count + 1, dtype=np.int32) * 32
    return pa.StringArray.from_buffers(
        count, pa.py_buffer(offsets), pa.py_buffer(source.bytes(16 * count).hex().encode())
    )


def _table(row_type: type, columns: dict[str, pa.Array]) -> pa.Table:
    """The columns of a row type; those that are not made are null."""
    from prefpipe.schemas import arrow_schema

    schema = arrow_schema(row_type)
    count = len(next(iter(columns.values())))
    return pa.table([columns.get(f.name, pa.nulls(count, f.type)) for f in schema], schema=schema)


def _lists(offsets: np.ndarray, values: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _digest(chosen: Any, rejected: Any) -> int:
    """The same number for the same pairs in any order."""
    import polars as pl

    both = pl.DataFrame({"c": chosen, "r": rejected}).select(pl.concat_str("c", "r").hash(0))
    return int(both.to_series().sort().hash(0).sum())


if __name__ == "__main__":
    main()
