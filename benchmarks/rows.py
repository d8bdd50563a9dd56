"""The rows of `prefpipe train`, from generated pairs: how long until the first step, bytes of a token, cost of a batch.

    python benchmarks/rows.py --pairs 1000000 --json FILE [--tokens 600] [--folder DIR]

A parent writes a run of pairs with reference log-probs and a model's config (no weights). Then processes, one after the
other, do what a rank does with rows before its first step, and draw batches: the first one makes the file of the node,
the second maps it. `private` is what a process holds for itself: Private_Dirty of smaps_rollup, less that before.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.config.train import TrainConfig
from prefpipe.ids import ids_digests, numbered_id
from prefpipe.models.policy import resolve
from prefpipe.runs import store
from prefpipe.schemas import Pair, arrow_schema

BATCH, PART = 64, 50_000
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 32,
    "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 32_000, "max_position_embeddings": 131_072,
}  # fmt: skip


def lists(flat: np.ndarray[Any, Any], ends: np.ndarray[Any, Any]) -> pa.ListArray:
    """Lists of numbers by their ends."""
    offsets = np.concatenate([[0], ends]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def part(number: int, size: int, tokens: int, reference: str) -> pa.Table:
    """Pairs of a prompt of half the tokens and two completions of a quarter each, 20 % longer or shorter."""
    draw = np.random.default_rng(number)
    sides: dict[str, tuple[Any, Any]] = {}
    for name, mean in (("prompt", tokens // 2), ("chosen", tokens // 4), ("rejected", tokens // 4)):
        ends = np.cumsum(draw.integers(max(1, int(0.8 * mean)), int(1.2 * mean) + 1, size))
        sides[name] = draw.integers(3, 32_000, int(ends[-1]), dtype=np.int32), ends
    views = {n: np.split(flat, ends[:-1]) for n, (flat, ends) in sides.items()}
    digests = [
        list(ids_digests(memoryview(p), [memoryview(c), memoryview(r)]))
        for p, c, r in zip(*views.values(), strict=True)
    ]
    values: dict[str, Any] = {
        "pair_id": [numbered_id("pair", number * PART + i) for i in range(size)],
        "prompt_id": [numbered_id("prompt", number * PART + i) for i in range(size)],
        "prompt_token_ids": lists(*sides["prompt"]),
        "weight": np.ones(size),
        "reward_gap": draw.random(size),
        "reference": [reference] * size,
        "scorer": ["forward-0/float32"] * size,
    }
    for place, side in enumerate(("chosen", "rejected")):
        flat, ends = sides[side]
        logps = lists(-draw.random(flat.size, dtype=np.float32), ends)
        values |= {
            f"{side}_completion_id": [numbered_id(side, number * PART + i) for i in range(size)],
            f"{side}_token_ids": lists(flat, ends),
            f"ref_{side}_token_logps": logps,
            f"{side}_ids_digest": [pair[place] for pair in digests],
            f"{side}_finish_reason": ["stop"] * size,
            side: [[]] * size,
        }
    values["prompt"] = [[]] * size
    schema = arrow_schema(Pair)
    columns = [_column(values[f.name], f.type) if f.name in values else pa.nulls(size, f.type) for f in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _column(values: Any, data_type: pa.DataType) -> Any:
    return values.cast(data_type) if isinstance(values, pa.Array) else pa.array(values, data_type)


def make(folder: Path, pairs: int, tokens: int) -> TrainConfig:
    """The settings of a run on generated pairs."""
    model = folder / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(MODEL))
    (model / "tokenizer.json").write_text("{}")
    empty_weights(model / "model.safetensors")
    with store.open_run(
        folder / "pairs", "build-pairs", BuildPairsConfig(), {"generated": str(pairs)}, force=False
    ) as run:
        for number, start in enumerate(range(0, pairs, PART)):
            run.write_part(
                "pairs", Pair, number, part(number, min(PART, pairs - start), tokens, resolve(str(model)).id)
            )
        run.finish({"pairs": pairs}, {})
    return TrainConfig(model=str(model), pairs=(str(folder / "pairs"),), dtype="float32", train_batch_size=BATCH)


def empty_weights(path: Path) -> None:
    """A safetensors file of one number."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


def private() -> int:
    """Bytes that this process alone holds."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty:"))


def rank(config: TrainConfig) -> dict[str, float]:
    """What a rank does with its rows before step 0, and the cost of batches in random order."""
    from prefpipe.stages.train import loading, loop, mapped, memory, mixing, process_memory, stage  # noqa: F401  (counted before)
    from prefpipe.stages.train.inputs import prepare
    from prefpipe.stages.train.margins import Margins
    from prefpipe.stages.train.micro_batches import micro_batches
    from prefpipe.stages.train.record_batches import Batch
    from prefpipe.stages.train.reference import audit

    before, start, start_cpu = private(), time.monotonic(), time.process_time()
    found: dict[str, float] = {}

    def note(name: str) -> None:
        found[name] = round(time.monotonic() - start, 3)

    data = prepare(config)
    note("rows")
    audit.check_all_cached(data.all_rows)
    mapped.column(data.computed_rows, Batch.largest_id)
    stage._say_targets(data, config)
    note("checked")
    audit._spread(data.all_rows, config.audit_rows)
    memory.probe_trees(data.rows)
    process_memory.return_free_memory()  # as `memory.measure` does behind the probe
    margins = Margins(data.rows, data.eval_rows)
    rows = mapped.all_or_none(data.rows)
    batches = mixing.epoch_batches(rows, config, 0)
    micro_batches([rows[i] for i in batches[0]], 8192)
    note("first step")
    found["first step, CPU seconds"] = round(time.process_time() - start_cpu, 3)
    start, start_cpu = time.monotonic(), time.process_time()
    for batch in batches[1:33]:
        micro_batches([rows[i] for i in batch], 8192)
    for name, seconds in (("ms", time.monotonic() - start), ("CPU ms", time.process_time() - start_cpu)):
        found[f"batch of 64, {name}"] = round(seconds / len(batches[1:33]) * 1000, 2)
    tokens = int(
        mapped.column(rows, lambda b: b.prompts.lengths).sum() + mapped.column(rows, Batch.completion_tokens).sum()
    )
    size = sum(path.stat().st_size for path in (data.stored or Path()).rglob("*.arrow"))
    found |= {"tokens": tokens, "file, bytes a token": round(size / tokens, 3),
              "private, bytes": private() - before,
              "private, bytes a token": round((private() - before) / tokens, 3)}  # fmt: skip
    assert margins
    return found


def main() -> None:
    """Measure, print, and write JSON where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--tokens", type=int, default=600, help="tokens of a pair")
    parser.add_argument("--folder", type=Path, help="where the pairs and the cache lie")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        print(json.dumps(rank(TrainConfig.model_validate_json(given.rank))))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        config = make(Path(folder), given.pairs, given.tokens)
        environment = {**os.environ, "XDG_CACHE_HOME": str(Path(folder) / "cache"), "OMP_NUM_THREADS": "1"}
        measured: dict[str, Any] = {"pairs": given.pairs, "load": os.getloadavg()[0]}
        for name in ("makes the file", "maps it"):
            command = [sys.executable, __file__, "--rank", config.model_dump_json()]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            measured[name] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(measured, indent=2))
    if given.json:
        given.json.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
