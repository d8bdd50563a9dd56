"""What separate rows cost: models that cannot share a row, two completions to a prompt, forward and backward.

    python benchmarks/separate_rows.py [--quick] [--only 'LFM2 32/16'] --json FILE

Random models of 256 hidden units with LoRA, float32, one thread; 192/64: two prompts of 192 tokens with completions of
40 and 88, and of 56 and 72; 32/16: twelve prompts of 32 tokens with completions of 10 and 22, or of 14 and 18. Medians
of CPU seconds of passes that take turns in one process:

- batched: what prefpipe does, rows of similar lengths in padded batches;
- one by one: a forward pass for each completion;
- shared: what the model would cost if completions shared a row, which is as many tokens in plain rows: `prompt, one
  completion, the other`. For Qwen3, whose completions do share a row, the shared row itself is measured too.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from train_vs_trl import ROOT

GOAL = 2.2
# (tokens of a prompt, tokens of both completions, tokens of the first completion of each prompt)
SHAPES: dict[str, tuple[int, int, tuple[int, ...]]] = {"192/64": (192, 128, (40, 56)), "32/16": (32, 32, (10, 14) * 6)}
COMMON: dict[str, Any] = {
    "vocab_size": 8000, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LINEAR = {
    "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 8, "linear_num_value_heads": 8
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-Next": (
        "Qwen3NextConfig",
        {"num_hidden_layers": 4, "layer_types": [*["linear_attention"] * 3, "full_attention"], "head_dim": 32,
         "moe_intermediate_size": 192, "shared_expert_intermediate_size": 192, "num_experts": 8,
         "num_experts_per_tok": 2, **LINEAR},
    ),
    "LFM2": (
        "Lfm2Config",
        {"num_hidden_layers": 6, "layer_types": ["conv", "conv", "full_attention"] * 2,
         "block_auto_adjust_ff_dim": False},
    ),
    "Falcon-H1": (
        "FalconH1Config",
        {"num_hidden_layers": 4, "mamba_n_heads": 16, "mamba_d_head": 32, "mamba_d_ssm": 512, "mamba_n_groups": 1,
         "mamba_d_state": 32, "mamba_chunk_size": 64},
    ),
    "Qwen3": ("Qwen3Config", {"num_hidden_layers": 4, "head_dim": 32}),
}  # fmt: skip


def main() -> None:
    """Measure every model in a process of its own, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first model, two passes")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        name, shape, passes = arguments.worker
        print(json.dumps(worker(name, shape, int(passes))))
        return
    figures: list[dict[str, Any]] = []
    print(f"{'':<20}{'batched':>10}{'one by one':>12}{'shared':>10}{'batched / shared':>18}{'one by one / shared':>21}")
    cases = [(name, shape) for shape in SHAPES for name in CONFIGS if arguments.only in f"{name} {shape}"]
    for name, shape in cases[:1] if arguments.quick else cases:
        found = run_worker(name, shape, 2 if arguments.quick else 9)
        for way in ("batched", "one by one"):
            ratio = found[way] / found["shared"]
            figures.append(
                {"name": f"{name} {shape}: {way} / shared", "figure": ratio, "unit": "x",
                 "goal": GOAL if way == "batched" else None, "holds": ratio <= GOAL if way == "batched" else None,
                 "seconds": found,
                 "command": "python benchmarks/separate_rows.py --json FILE",
                 "versions": {p: version(p) for p in ("torch", "transformers", "peft")}}
            )  # fmt: skip
        ratios = (figures[-2]["figure"], figures[-1]["figure"])
        times = f"{found['batched']:>8.3f} s{found['one by one']:>10.3f} s{found['shared']:>8.3f} s"
        extra = f"   the shared row itself {found['tree']:.3f} s" if "tree" in found else ""
        print(f"{name + ' ' + shape:<20}{times}{ratios[0]:>16.2f} x{ratios[1]:>19.2f} x{extra}", flush=True)
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def run_worker(name: str, shape: str, passes: int) -> dict[str, float]:
    """One model in a fresh process with one thread."""
    command = [sys.executable, __file__, "--json", os.devnull, "--worker", name, shape, str(passes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def worker(name: str, shape: str, passes: int) -> dict[str, float]:
    """CPU seconds of forward and backward by the way that rows are computed."""
    import torch
    import transformers

    from prefpipe.forward import load
    from prefpipe.forward.layout import Tree
    from prefpipe.forward.logps import Rows, TreeModel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    kind, settings = CONFIGS[name]
    config = getattr(transformers, kind)(**COMMON, **settings)
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        base = load.load_model(Path(folder), "float32")
    model = TreeModel(load.add_lora(base, r=16, alpha=32, target_modules="all-linear", seed=0))
    source = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(source.choices(range(3, 8000), k=count))

    prompt, both, firsts = SHAPES[shape]
    pairs = [Tree(ids(prompt), (ids(first), ids(both - first))) for first in firsts]
    joined = [Tree(pair.prompt, (pair.completions[0] + pair.completions[1],)) for pair in pairs]
    ways: dict[str, tuple[Rows, list[Tree]]] = {
        "batched": ("separate", pairs), "one by one": ("single", pairs), "shared": ("separate", joined)
    }  # fmt: skip
    if name == "Qwen3":
        ways["tree"] = ("shared", pairs)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(passes + 1):
        for way, (rows, trees) in ways.items():
            model.set_rows(rows)
            layout = model.layout(trees)
            begin = time.process_time()
            model(layout).sum().backward()
            if number:  # the first pass warms up
                seconds[way].append(time.process_time() - begin)
    return {way: statistics.median(times) for way, times in seconds.items()}


if __name__ == "__main__":
    main()
