"""prefpipe against TRL 1.16 on this machine: same model, token ids, adapter, order and loss, one thread, side by side.

    python benchmarks/train_vs_trl.py [--quick] [--only NAME ...] --json FILE

Every side runs in a process of its own, so that peaks of memory do not mix. TRL tokenises the texts; its ids, its
initial adapter and its order are handed to prefpipe. Times are CPU seconds of the one thread (wall seconds, were the
machine idle), medians of steps. CPU ratios say nothing about a GPU: TRL's output head scores every position on CPU,
which flatters us here; `body` leaves both heads out.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = "embedded:smollm2-135m-instruct"
LEARNING_RATE = 1e-4
WORDS = (
    *("time", "water", "house", "light", "world", "hand", "place", "work", "story", "night", "music", "paper", "green"),
    *("river", "stone", "garden", "winter", "summer", "bread", "table", "window", "street", "morning", "people"),
    *("letter", "ground", "family", "power", "money", "reason"),
)


@dataclass(frozen=True)
class Case:
    """A data shape and how both sides run it. `completions` K: 2 gives a pair per prompt, 8 gives 16 of one prompt."""

    name: str
    prompt: int
    completion: int
    completions: int
    dtype: str
    batch: int
    steps: int
    checkpointing: bool
    goal_speed: float | None
    goal_memory: float | None
    goal_reference: float | None
    shipped: bool = False


CASES = (
    Case("fp32 192/64 K=2", 192, 64, 2, "float32", 4, 3, False, 2.5, 0.4, 2.6),
    Case("bf16 192/64 K=2", 192, 64, 2, "bfloat16", 4, 3, False, 2.6, 0.4, 2.6),
    Case("defaults 192/64 K=2", 192, 64, 2, "bfloat16", 4, 3, True, 3.5, None, None),
    Case("fp32 192/64 K=8", 192, 64, 8, "float32", 16, 3, False, 12.0, 0.3, None),
    Case("fp32 64/128 K=2", 64, 128, 2, "float32", 4, 3, False, 1.5, None, None),
    Case("fp32 512/128 K=2", 512, 128, 2, "float32", 2, 3, False, None, None, None),
    Case("fp32 shipped pairs", 0, 0, 2, "float32", 8, 3, False, 2.5, None, None, shipped=True),
)


def main() -> None:
    """Run the cases, print one table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one step of each case")
    parser.add_argument("--only", nargs="*", default=[], help="names of cases")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        side, case, folder = arguments.worker
        WORKERS[side](Case(**json.loads(case)), Path(folder))
        return
    figures: list[dict[str, Any]] = []
    for case in CASES:
        if arguments.only and case.name not in arguments.only:
            continue
        if arguments.quick:
            case = Case(**{**asdict(case), "steps": 1})
        figures += measure(case)
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    for f in figures:
        goal = "" if f["goal"] is None else f"{f['goal']:g}"
        verdict = {True: "holds", False: "MISSED", None: ""}[f["holds"]]
        print(f"{f['name']:<52} {f['figure']:>9.3f} {f['unit']:<12} {goal:>6} {verdict}")


def measure(case: Case) -> list[dict[str, Any]]:
    """Both sides of one case, and the figures that follow."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_texts(case, folder / "pairs.jsonl")
        trl, ours = run_worker("trl", case, folder), run_worker("ours", case, folder)
    worst = max(abs(a - b) for a, b in zip(trl["losses"], ours["losses"], strict=True))
    figures = [
        figure(case, "pairs/s, prefpipe", ours["pairs_per_s"], "pairs/s"),
        figure(case, "pairs/s, TRL", trl["pairs_per_s"], "pairs/s"),
        figure(case, "speed over TRL", ours["pairs_per_s"] / trl["pairs_per_s"], "x", case.goal_speed),
        figure(case, "speed over TRL, body only", trl["body_s"] / ours["body_s"], "x"),
        figure(case, "memory growth over TRL's", ours["growth"] / trl["growth"], "x", case.goal_memory, at_most=True),
        figure(case, "memory growth, prefpipe", ours["growth"] / 2**20, "MiB"),
        figure(case, "memory growth, TRL", trl["growth"] / 2**20, "MiB"),
        figure(case, "reference pass over TRL", trl["reference_s"] / ours["reference_s"], "x", case.goal_reference),
        figure(case, "step over bare forward+backward", ours["step_s"] / ours["floor_s"], "x", 1.10, at_most=True),
        figure(case, "step-0 loss, prefpipe", ours["losses"][0], ""),
        figure(case, "step-0 loss, TRL", trl["losses"][0], ""),
    ]
    limit = 1e-4 if case.dtype == "float32" else None
    return [*figures, figure(case, "largest difference of losses", worst, "", limit, at_most=True)]


def figure(
    case: Case, name: str, value: float, unit: str, goal: float | None = None, *, at_most: bool = False
) -> dict[str, Any]:
    """One line of the table."""
    holds = None if goal is None else (value <= goal if at_most else value >= goal)
    return {
        "name": f"{case.name}: {name}",
        "figure": value,
        "unit": unit,
        "goal": goal,
        "holds": holds,
        "command": f"python benchmarks/train_vs_trl.py --only '{case.name}' --json FILE",
        "versions": {p: version(p) for p in ("torch", "transformers", "peft", "trl")},
    }


def run_worker(side: str, case: Case, folder: Path) -> dict[str, Any]:
    """One side in a fresh process with one thread."""
    command = [sys.executable, __file__, "--json", os.devnull, "--worker", side, json.dumps(asdict(case)), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    return json.loads((folder / f"{side}.json").read_text())


def write_texts(case: Case, path: Path) -> None:
    """Conversations of about the wanted numbers of tokens; words of one token each, from a fixed seed."""
    if case.shipped:
        lines = (ROOT / "data" / "pairs.jsonl").read_text().splitlines()[: case.batch * case.steps]
        path.write_text("\n".join(lines) + "\n")
        return
    source = random.Random(0)

    def text(tokens: int) -> str:
        return " ".join(source.choices(WORDS, k=max(1, tokens)))

    rows: list[dict[str, Any]] = []
    overhead = 29  # control tokens and default system message of the chat template
    for _ in range(case.steps if case.completions == 8 else case.steps * case.batch):
        prompt = [{"role": "user", "content": text(case.prompt - overhead)}]
        answers = [[{"role": "assistant", "content": text(case.completion - 2)}] for _ in range(case.completions)]
        half = case.completions // 2
        rows += [{"prompt": prompt, "chosen": c, "rejected": r} for c in answers[:half] for r in answers[half:]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Peak:
    """Highest resident memory over what it was at the start, sampled by a thread."""

    def __init__(self) -> None:
        self._start = self.highest = _resident()
        self._going = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def growth(self) -> int:
        """Stop and tell."""
        self._going = False
        self._thread.join()
        return self.highest - self._start

    def _watch(self) -> None:
        while self._going:
            self.highest = max(self.highest, _resident())
            time.sleep(0.01)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def worker_trl(case: Case, folder: Path) -> None:
    """TRL's DPOTrainer with a precomputed reference; writes its ids and initial adapter for the other side."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from prefpipe.models import policy

    torch.set_num_threads(1)
    directory = str(policy.resolve(MODEL).directory)
    spent: dict[str, float] = {}
    precompute = DPOTrainer._precompute_ref_logps

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        result = precompute(self, *args, **kwargs)
        spent["reference"] = time.process_time() - start
        return result

    DPOTrainer._precompute_ref_logps = timed
    per_device = min(case.batch, 4)
    settings = DPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=case.dtype == "bfloat16",
        model_init_kwargs={"dtype": "float32"},
        loss_type=["sigmoid"], beta=0.1, max_length=2048, precompute_ref_log_probs=True, precompute_ref_batch_size=4,
        per_device_train_batch_size=per_device, gradient_accumulation_steps=case.batch // per_device,
        max_steps=case.steps, learning_rate=LEARNING_RATE, lr_scheduler_type="constant", warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0, optim="adamw_torch", gradient_checkpointing=case.checkpointing, logging_steps=1,
        save_strategy="no", report_to="none", seed=1, disable_tqdm=True, dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    lora = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    data = load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train")
    trainer = DPOTrainer(
        model=directory, args=settings, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(directory),
        peft_config=lora,
    )  # fmt: skip
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{c: list(row[c]) for c in columns} for row in trainer.train_dataset]
    (folder / "ids.json").write_text(json.dumps(rows))
    trainer.model.save_pretrained(str(folder / "adapter"))
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            times.append(-time.process_time())

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            times[-1] += time.process_time()

    trainer.add_callback(Clock())
    peak = Peak()
    trainer.train()
    growth = peak.growth()
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    result = {"losses": losses, "pairs_per_s": case.batch / statistics.median(times), "growth": growth}
    result |= {"reference_s": spent["reference"], "body_s": _padded_body(trainer.model, rows[: case.batch], case)}
    (folder / "trl.json").write_text(json.dumps(result))


def _padded_body(model: Any, rows: list[dict[str, list[int]]], case: Case) -> float:
    """Forward and backward of the decoder on one batch in TRL's layout: two padded rows for every pair, no head."""
    import torch

    sequences = [r["prompt_ids"] + r[side] for side in ("chosen_ids", "rejected_ids") for r in rows]
    width = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    body = model.get_base_model().base_model
    model.train()

    def work() -> None:
        per_device = 2 * min(case.batch, 4)
        for start in range(0, len(ids), per_device):
            part = slice(start, start + per_device)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.dtype == "bfloat16"):
                states = body(input_ids=ids[part], attention_mask=mask[part], use_cache=False).last_hidden_state
            states.sum().backward()

    return statistics.median(_seconds(work) for _ in range(2))


def worker_ours(case: Case, folder: Path) -> None:
    """prefpipe's own loop on the ids, the adapter and the order of the other side."""
    import torch

    from prefpipe.config.train import TrainConfig
    from prefpipe.forward import load
    from prefpipe.forward.attention import Row
    from prefpipe.forward.logps import TreeModel, score
    from prefpipe.models import policy
    from prefpipe.stages.train import loop
    from prefpipe.stages.train.examples import TrainPair
    from prefpipe.stages.train.micro_batches import global_batches, micro_batches
    from prefpipe.stages.train.optimizer import MasterOptimizer
    from prefpipe.stages.train.parallel import World

    torch.set_num_threads(1)
    config = TrainConfig(
        loss_type=("sigmoid",), learning_rate=LEARNING_RATE, lr_scheduler_type="constant", warmup_ratio=0.0,
        train_batch_size=case.batch, dtype=case.dtype, max_tokens_per_micro_batch=768,
    )  # fmt: skip
    base = load.load_model(policy.resolve(MODEL).directory, case.dtype)
    model = TreeModel(load.load_adapter(base, folder / "adapter", trainable=True))
    rows = [
        (tuple(r["prompt_ids"]), tuple(r["chosen_ids"]), tuple(r["rejected_ids"]))
        for r in json.loads((folder / "ids.json").read_text())
    ]
    trees = _trees(rows)
    start = time.process_time()
    with load.adapter_off(model.policy, off=True):  # as TRL does, and as `prefpipe train` does
        scored = list(score(model, trees))
    reference_s = time.process_time() - start
    cached = {(t.prompt, c): v for t, own in zip(trees, scored, strict=True)
              for c, v in zip(t.completions, own, strict=True)}  # fmt: skip
    given = [
        TrainPair(str(i), "", "", p, c, r, tuple(cached[(p, c)]), tuple(cached[(p, r)]), 1.0)
        for i, (p, c, r) in enumerate(rows)
    ]
    order = [
        row for step in global_batches([p.prompt_ids for p in given], case.batch, 0, 0, together=False) for row in step
    ]
    # The loop shuffles: hand the pairs over so that it meets them in TRL's order.
    pairs: list[TrainPair] = [given[order.index(row)] for row in range(len(given))]
    trainer = loop.Trainer(
        model, model, MasterOptimizer(model, 0.0), config, World(0, 1), config.max_tokens_per_micro_batch
    )
    times: list[float] = []
    losses: list[float] = []
    peak = Peak()
    steps = loop.steps(trainer, pairs, 0)
    for _ in range(case.steps):
        times.append(_seconds(lambda: losses.append(next(steps).values["loss"])))  # noqa: PERF401  (lambda has effects)
    growth = peak.growth()
    layouts = [model.layout(m.trees) for m in micro_batches(given[: case.batch], config.max_tokens_per_micro_batch)]

    def floor() -> None:
        for layout in layouts:
            model(layout).sum().backward()

    def body() -> None:
        for layout in layouts:
            inner = model.policy.get_base_model().base_model
            inner(input_ids=layout.input_ids.unsqueeze(0), position_ids=layout.position_ids.unsqueeze(0),
                  use_cache=False, tree_row=Row(layout.spans)).last_hidden_state.sum().backward()  # fmt: skip

    result = {"losses": losses, "pairs_per_s": case.batch / statistics.median(times), "growth": growth}
    result |= {"step_s": statistics.median(times), "reference_s": reference_s}
    result |= {"floor_s": statistics.median(_seconds(floor) for _ in range(3))}
    result |= {"body_s": statistics.median(_seconds(body) for _ in range(2))}
    (folder / "ours.json").write_text(json.dumps(result))


def _trees(rows: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]) -> list[Any]:
    """Every prompt once with its distinct completions."""
    from prefpipe.forward.layout import Tree

    by_prompt: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    for prompt, chosen, rejected in rows:
        by_prompt.setdefault(prompt, {}).update({chosen: None, rejected: None})
    return [Tree(prompt, tuple(completions)) for prompt, completions in by_prompt.items()]


WORKERS: dict[str, Callable[[Case, Path], None]] = {"trl": worker_trl, "ours": worker_ours}

if __name__ == "__main__":
    main()
