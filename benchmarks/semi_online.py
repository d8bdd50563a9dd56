"""Fifty small rounds with one warm engine against five large ones, at equal samples: a small model that adds.

    python benchmarks/semi_online.py --out runs/semi-online --json docs/results/semi-online.json [--seeds 3] [--quick]

A Llama of 59,000 weights over bytes is taught one-digit sums with half of the answers drawn at random, so that it
samples right and wrong ones. Then `prefpipe iterate` runs twice per seed with the same settings: 5 rounds of all 90
training sums, and 50 rounds of 9 of them, each dealt five times. Both sample 16 answers to a sum, 7,200 in all, and
train on the same number of epochs. Accuracy is that of 32 fresh samples of every training sum, by one engine that takes
the adapter of every round.
"""

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SUMS = [(a, b) for a in range(10) for b in range(10)]
HELD_OUT = 10  # sums, for the evaluations of the rounds themselves
SAMPLES, FRESH = 16, 32  # answers to a sum in a round, and to measure accuracy
RIGHT_SHARE = 0.5
WAYS: dict[str, dict[str, Any]] = {
    "offline": {"rounds": 5},
    "semi-online": {"rounds": 50, "prompts_per_round": 9, "repeat_prompts": True, "evaluate_every": 10},
}


def right(completions: list[Any], answer: list[str], **_columns: Any) -> list[float]:
    """The reward: 1 for the sum, 0 for anything else."""
    said = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(text.strip() == wanted) for text, wanted in zip(said, answer, strict=True)]


def main() -> None:
    """Teach, run both ways for every seed, measure after every round, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed, 1 round against 5 of a fifth of its prompts")
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    ways = WAYS
    if arguments.quick:
        ways = {"offline": {"rounds": 1}, "semi-online": {**WAYS["semi-online"], "rounds": 5, "prompts_per_round": 18}}
    runs: list[dict[str, Any]] = []
    for seed in range(1 if arguments.quick else arguments.seeds):
        folder = arguments.out / f"seed-{seed}"
        prompts = write_prompts(folder, seed)
        model = folder / "model"
        if not model.exists():
            teach(model, seed)
        for way, changes in ways.items():
            runs.append(measure(folder / way, model, prompts, seed, way, changes))
            arguments.json.write_text(json.dumps(figures(runs), indent=2) + "\n")
    print("\n".join(table(runs)))


def write_prompts(folder: Path, seed: int) -> Path:
    """The sums, of which some are held out."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = set(random.Random(seed).sample(SUMS, HELD_OUT))
    path = folder / "sums.jsonl"
    rows = [
        {"prompt": f"{a}+{b}=", "answer": str(a + b), "split": "heldout" if (a, b) in held_out else "train"}
        for a, b in SUMS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def teach(directory: Path, seed: int, steps: int = 400) -> None:
    """A model that answers about half of the sums rightly, by cross entropy on answers of which half are right and the
    others any number."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from prefpipe.models.chat import load_chat
    from prefpipe.models.encoding import encode
    from tests.tiny import write_tokenizer

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=264, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
            pad_token_id=0,
        )
    )  # fmt: skip
    made = directory.with_name("model.part")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    write_tokenizer(made)
    model.save_pretrained(made)
    chat = load_chat(made, "none")
    end = min(chat.eos_token_ids)
    asked = {(a, b): encode(chat, f"{a}+{b}=") for a, b in SUMS}
    answers = [encode(chat, str(number)) for number in range(19)]
    adamw, source = torch.optim.AdamW(model.parameters(), weight_decay=0.0), random.Random(seed + 1)
    for step in range(steps):
        adamw.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20) * (1 - step / steps) + 1e-5
        rows: list[tuple[int, list[int]]] = []
        for a, b in source.choices(SUMS, k=128):
            said = a + b if source.random() < RIGHT_SHARE else source.randrange(19)
            rows.append((len(asked[a, b]), [*asked[a, b], *answers[said], end]))
        width = max(len(ids) for _, ids in rows)
        tokens = torch.tensor([ids + [0] * (width - len(ids)) for _, ids in rows])
        targets = torch.tensor([[-100] * n + ids[n:] + [-100] * (width - len(ids)) for n, ids in rows])
        model(input_ids=tokens, labels=targets).loss.backward()
        adamw.step()
        adamw.zero_grad()
    model.save_pretrained(made)
    made.rename(directory)


def recipe(model: Path, prompts: Path, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
    """The settings of `prefpipe iterate`; both ways have the same tables."""
    sampling = {
        "prompts": str(prompts), "engine": "transformers", "dtype": "float32", "chat_template": "none",
        "max_tokens": 3, "max_prompt_tokens": 8, "max_num_seqs": 1024, "seed": 1000 * seed,
    }  # fmt: skip
    reward = "semi_online:right"
    return {
        "model": str(model),
        "stop": {"rules": []},
        "generate": {**sampling, "split": "train", "num_samples": SAMPLES, "rewards": [reward], "check": 0},
        "build_pairs": {
            "reward": reward, "rule": "correct-wrong", "pairs_per_prompt": 4, "truncated_chosen": "keep",
            "gap_filter": "none",
        },
        "train": {
            "dtype": "float32", "chat_template": "none", "loss_type": ["sigmoid", "nll"], "loss_weights": [1.0, 1.0],
            "beta": 0.1, "learning_rate": 2e-3, "lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.0,
            "num_train_epochs": 2, "train_batch_size": 64, "lora_r": 16, "seed": 1000 * seed,
        },
        "evaluate": {**sampling, "split": "heldout", "num_samples": 8, "reward": reward},
        **changes,
    }  # fmt: skip


def measure(out: Path, model: Path, prompts: Path, seed: int, way: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Run one way; accuracy and samples after every round, and how long a round took."""
    from prefpipe.config.iterate import IterateConfig
    from prefpipe.stages.iterate import stage

    config = IterateConfig.model_validate(recipe(model, prompts, seed, changes))
    began = time.monotonic()
    stage.run(config, out, force=False)
    seconds = time.monotonic() - began
    accuracies = list(curve(out, model, prompts, config.rounds))
    sampled = [samples(out, number) for number in range(1, config.rounds + 1)]
    points = [{"round": 0, "samples": 0, "accuracy": accuracies[0]}]
    points += [
        {"round": n, "samples": sum(sampled[:n]), "accuracy": accuracies[n]} for n in range(1, config.rounds + 1)
    ]
    print(f"seed {seed}, {way}: {accuracies[0]:.1%} -> {accuracies[-1]:.1%}, {seconds / config.rounds:.1f} s a round")
    return {"seed": seed, "way": way, "rounds": config.rounds, "seconds": round(seconds, 1), "curve": points}


def curve(out: Path, model: Path, prompts: Path, rounds: int) -> Iterator[float]:
    """The share of right answers before training and after every round, by one engine that takes every adapter."""
    from prefpipe import engines
    from prefpipe.engines.base import EngineSettings, Request
    from prefpipe.models.chat import load_chat
    from prefpipe.models.encoding import encode
    from prefpipe.models.policy import resolve

    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    chat = load_chat(model, "none")
    asked = [
        (row["answer"], Request(row["prompt"], encode(chat, row["prompt"]), tuple(draws(number))))
        for number, row in enumerate(rows)
        if row["split"] == "train"
    ]
    answers = {request.prompt_id: answer for answer, request in asked}
    with engines.load("transformers", EngineSettings(resolve(str(model)), chat, "float32", 1.0, 3, 16, 1024, 64)) as e:
        for number in range(rounds + 1):
            if number and not e.take(resolve(str(model), str(out / f"round-{number}/train/adapter"))):
                sys.exit("the engine takes no adapter")
            said = [
                (answers[request.prompt_id], chat.decode_all([sample.token_ids])[0])
                for request, found in e.generate(request for _, request in asked)
                for sample in found
            ]
            yield sum(text.strip() == wanted for wanted, text in said) / len(said)


def draws(number: int) -> Iterator[Any]:
    """Fresh samples of a sum: seeds that no round has."""
    from prefpipe.engines.base import Draw

    return (Draw(k, 10**9 + FRESH * number + k, 1.0) for k in range(FRESH))


def samples(out: Path, number: int) -> int:
    """How many completions a round has sampled."""
    totals = json.loads((out / f"round-{number}/generate/manifest.json").read_text())["totals"]
    return int(totals["completions"])


def figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the JSON holds."""
    return {
        "command": "python benchmarks/semi_online.py --out runs/semi-online --json docs/results/semi-online.json",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "fresh_samples_per_point": FRESH * (len(SUMS) - HELD_OUT),
        "runs": runs,
    }


def table(runs: list[dict[str, Any]]) -> list[str]:
    """Accuracy by samples, a column for each run, at the points of the offline rounds."""
    wanted = sorted({point["samples"] for run in runs if run["way"] == "offline" for point in run["curve"]})
    lines = ["| samples | " + " | ".join(f"{run['way']}, seed {run['seed']}" for run in runs) + " |"]
    lines.append("| ---: |" + " ---: |" * len(runs))
    for count in wanted:
        cells = [next((f"{p['accuracy']:.1%}" for p in run["curve"] if p["samples"] == count), "") for run in runs]
        lines.append(f"| {count} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
