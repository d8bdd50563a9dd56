"""Tokens per CPU second of the transformers engine, beside those of another version of it in the same process.

    git show COMMIT:prefpipe/engines/transformers.py > runs/older.py
    python benchmarks/sampling.py --json FILE [--older runs/older.py] [--prompts 64] [--draws 4]

Prompts of the demo, which have different lengths; SmolLM2-135M in the number type of this machine; one thread. CPU
time, because other work on the machine does not count into it. Queries are sampled without the scoring pass behind
samples.
"""

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch loads

from prefpipe import engines, machine
from prefpipe.engines.base import Draw, EngineSettings, Query, Request
from prefpipe.ids import sample_seed
from prefpipe.models.chat import load_chat
from prefpipe.models.encoding import encode, render
from prefpipe.models.policy import resolve

ROOT = Path(__file__).resolve().parents[1]
MODEL = "embedded:smollm2-135m-instruct"


def main() -> None:
    """Run both versions on the same requests, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--older", type=Path, help="another version of prefpipe/engines/transformers.py")
    parser.add_argument("--engine", default="transformers", help="transformers or vllm")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--adapter", default="none")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    policy = resolve(MODEL, arguments.adapter)
    chat = load_chat(policy.directory)
    lines = (ROOT / "data" / "prompts.jsonl").read_text().splitlines()[: arguments.prompts]
    requests = []
    for number, line in enumerate(lines):
        ids = encode(chat, render(chat, json.loads(line)["messages"], add_generation_prompt=True))
        draws = tuple(Draw(k, sample_seed(0, str(number), k), 1.0) for k in range(arguments.draws))
        requests.append(Request(str(number), ids, draws))
    settings = EngineSettings(policy, chat, machine.number_type()[0], 1.0, arguments.max_tokens, 256, 64, 512)
    figures = [measure("this version", engines.load(arguments.engine, settings), requests)]
    if arguments.older:
        spec = importlib.util.spec_from_file_location("older", arguments.older)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        figures.append(measure("older version", module.TransformersEngine(settings), requests))
        ratio = figures[0]["tokens_per_cpu_second"] / figures[1]["tokens_per_cpu_second"]
        print(f"this version / older version: {ratio:.2f} x the tokens per CPU second")
        figures[0]["ratio"] = ratio
    arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def measure(name: str, engine: Any, requests: list[Request]) -> dict[str, Any]:
    """CPU seconds of sampling with log-probs, and of answering queries: the same tokens without a scoring pass."""
    with engine:
        list(engine.generate(requests[:1]))  # what is done once
        both, tokens = timed(lambda: (s.token_ids for _, samples in engine.generate(requests) for s in samples))
        queries = [
            Query(f"{r.prompt_id}/{d.sample_index}", r.prompt_token_ids, d.seed, d.temperature, None)
            for r in requests
            for d in r.draws
        ]
        alone, answered = timed(lambda: (response.token_ids for _, response in engine.respond(queries)))
    print(
        f"{name:<14} {tokens} tokens of {len(requests)} prompts x {len(requests[0].draws)}: {both:.1f} CPU s, "
        f"{tokens / both:.1f} tokens per CPU s; queries, without log-probs: {alone:.1f} CPU s, "
        f"{answered / alone:.1f} tokens per CPU s",
        flush=True,
    )
    return {
        "name": name, "prompts": len(requests), "draws": len(requests[0].draws), "tokens": tokens, "cpu_seconds": both,
        "tokens_per_cpu_second": tokens / both, "queries_cpu_seconds": alone,
        "query_tokens_per_cpu_second": answered / alone,
    }  # fmt: skip


def timed(sample: Any) -> tuple[float, int]:
    """CPU seconds of a run through all samples, and their tokens."""
    start = time.process_time()
    found: Iterable[list[int]] = list(sample())
    return time.process_time() - start, sum(map(len, found))


if __name__ == "__main__":
    main()
