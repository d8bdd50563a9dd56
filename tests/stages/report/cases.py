"""Whole run directories without a model: rounds of `iterate` with texts, rewards, metrics and alerts as one asks."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefpipe.config.iterate import IterateConfig
from prefpipe.engines.base import ScoreRequest
from prefpipe.ids import content_id, ids_digest
from prefpipe.inference import parity
from prefpipe.inference.parity import CachedLogps
from prefpipe.runs import store
from prefpipe.runs.store import Manifest, Run
from prefpipe.schemas import Completion, Dropped, Evaluation, Margin, Pair, Prompt, RefLogps, Reward, to_table
from prefpipe.stages.iterate import plan
from prefpipe.stages.iterate.plan import Step

TOPICS = (
    "ivy",
    "a river",
    "an island",
    "salt",
    "a kettle",
    "an owl",
    "bread",
    "rain",
    "a harp",
    "moss",
    "a tram",
    "clay",
)
LONG = (
    "{} is a kind of thing that can be found in many parts of the world, and it is known for a long and varied "
    "history that people have told and told again"
)
SHORT = "{} is quiet, useful and older than it looks."


@dataclass(frozen=True)
class Shape:
    """How large a run is, and what its texts are: functions of a number."""

    rounds: int = 2
    prompts: int = 12
    samples: int = 4
    pairs: int = 24
    steps: int = 40
    alerts: Sequence[dict[str, Any]] = ()
    topic: Callable[[int], str] = lambda number: TOPICS[number % len(TOPICS)]
    answer: Callable[[int, int], str] = lambda number, round: (SHORT if (number * 7) % 3 < round else LONG).format(
        TOPICS[number % len(TOPICS)].capitalize()
    )
    reward: str = "short_sentence"
    reason: str = "too_long"
    config: dict[str, Any] = field(default_factory=dict[str, Any])


def iterate_run(out: Path, shape: Shape = Shape()) -> Path:
    """Every step of some rounds, complete, and their manifest."""
    config = config_of(shape)
    manifests: dict[str, Manifest] = {}
    with store.open_run(out, "iterate", config, {"policy": "weights:0"}, force=False) as root:
        for number in range(shape.rounds + 1):
            for step in plan.steps(config, out, number, plan.Known()):
                manifests[step.name] = write(step, out / step.name, shape, manifests)
        rounds = [m["totals"] for name, m in manifests.items() if name.endswith("evaluate")]
        root.log_timing(event="rounds", seconds=512.3)
        root.finish({"rounds": rounds}, {name: m["digest"] for name, m in manifests.items()})
    return out


def config_of(shape: Shape) -> IterateConfig:
    return IterateConfig.model_validate(
        {
            "model": "org/model", "rounds": shape.rounds,
            "generate": {"prompts": "prompts.jsonl", "engine": "fake", "rewards": ["short_sentence"]},
            "build_pairs": {"reward": "short_sentence"},
            "train": {"learning_rate": 2e-4, "eval_split": 0.1, "loss_type": ["sigmoid", "nll"],
                      "loss_weights": [1.0, 1.0], **shape.config},
            "evaluate": {"prompts": "prompts.jsonl", "engine": "fake", "reward": "short_sentence"},
        }
    )  # fmt: skip


def write(step: Step, out: Path, shape: Shape, before: dict[str, Manifest]) -> Manifest:
    """One step as its command leaves it."""
    here = f"round-{step.round}"
    if step.command == "generate":
        inputs = {"prompts": "digest-of-prompts", "policy": f"weights:{step.round - 1}"}
        make = _generate
    elif step.command == "build-pairs":
        inputs, make = {"completions.0": before[f"{here}/generate"]["digest"]}, _build_pairs
    elif step.command == "train":
        inputs, make = {"pairs.0": before[f"{here}/build-pairs"]["digest"], "policy": "weights:0"}, _train
    else:
        inputs, make = {"prompts": "digest-of-prompts", "policy": f"weights:{step.round}"}, _evaluate
    with store.open_run(out, step.command, step.config, inputs, force=False) as run:
        manifest = make(run, step.round, shape)
        run.log_timing(event="done", seconds=12.5)
    return manifest


def prompt(shape: Shape, number: int) -> Prompt:
    messages = [{"role": "user", "content": f"Tell me about {shape.topic(number)} in one short sentence."}]
    return Prompt(f"prompt-{number}", messages, None, "train", "cases", "{}")  # type: ignore[arg-type]  # a message


def _generate(run: Run, round: int, shape: Shape) -> Manifest:
    prompts = [prompt(shape, number) for number in range(shape.prompts)]
    draw = random.Random(round)
    completions, logps, rewards = list[Completion](), list[RefLogps](), list[Reward]()
    for number in range(shape.prompts):
        for sample in range(shape.samples):
            text = shape.answer(number + sample, round - 1)
            key, ids = f"{round}-{number}-{sample}", [5] * max(len(text.split()), 1)
            digest = ids_digest([3, 4], ids)
            completions.append(
                Completion(key, f"prompt-{number}", sample, text, [3, 4], ids, "stop", "weights:0", digest)
            )
            values = [-0.5 - draw.random() for _ in ids]
            logps.append(RefLogps(key, "weights:0", "fake", digest, values, sum(values), len(ids)))
            rewards.append(Reward(key, shape.reward, round_(1 / (1 + len(ids) / 8) + draw.random() / 9), "ok", None))
    run.write_part("prompts", Prompt, 0, to_table(Prompt, prompts))
    run.write_part("completions", Completion, 0, to_table(Completion, completions))
    run.write_part("ref_logps", RefLogps, 0, to_table(RefLogps, logps))
    run.write_part(f"rewards/{shape.reward}", Reward, 0, to_table(Reward, rewards))
    run.write_dropped(Dropped, to_table(Dropped, [Dropped("p9", shape.reason, "1,300 tokens")]))
    report = _parity()
    run.write_report("parity.json", report)
    return run.finish(
        {"prompts": shape.prompts, "completions": len(completions), "tokens": 900, "parity": report},
        {"policy": f"weights:{round - 1}", "reference": f"weights:{round - 1}"},
    )


def _parity() -> dict[str, Any]:
    draw = random.Random(0)
    cached = [CachedLogps(ScoreRequest(f"c{i}", [1], [2] * 12), [-1.0] * 12) for i in range(32)]
    fresh = {f"c{i}": [-1.0 + draw.gauss(0, 2e-3) for _ in range(12)] for i in range(32)}
    return {"scorer": "forward-2/bfloat16", "other": "vllm", **parity.compare(cached, fresh, "bfloat16")}


def _build_pairs(run: Run, round: int, shape: Shape) -> Manifest:
    draw = random.Random(round)
    rows = [_pair(number, draw, round, shape) for number in range(shape.pairs)]
    run.write_part("pairs", Pair, 0, to_table(Pair, rows))
    run.write_dropped(Dropped, to_table(Dropped, [Dropped("c1", "empty", "2 tokens")]))
    checks = [
        _check("D1", "reward gap", "OK", "mean 0.4, sd 0.1, 3% dropped as small", mean=0.4, min=0.1),
        _check("D4", "hardness", "OK", "the reference prefers chosen in 55%", reference_prefers_chosen=0.55),
        _check("D6", "size", "WARN", f"{shape.pairs} pairs", pairs=shape.pairs),
        _check("D7", "length bias", "WARN", "chosen longer in 12%, length ratio 0.41", chosen_longer=0.12),
        _check("D11", "off-policy", "NOTICE", "reference log-prob per token -0.98 chosen", chosen_per_token=-0.98),
    ]
    run.write_report("data_report.json", {"checks": checks})
    levels = {
        "completions": {"in": 48, "out": 44, "dropped": {"empty": 1, "truncated": 3}},
        "prompts": {"in": 12, "out": 11, "dropped": {"tie": 1}},
        "pairs": {"in": shape.pairs + 2, "out": shape.pairs, "dropped": {"small_gap": 2}},
    }
    totals = {"completions": 48, "prompts": 12, "pairs": shape.pairs, "levels": levels, "data_report": checks}
    return run.finish({**totals, "dropped": {"empty": 1, "truncated": 3, "tie": 1, "small_gap": 2}}, {"reward": "r"})


def _check(name: str, title: str, level: str, found: str, **numbers: Any) -> dict[str, Any]:
    advice = "what one could do about it" if level != "OK" else ""
    return {"id": name, "name": title, "level": level, "found": found, "advice": advice, "numbers": numbers}


def _pair(number: int, draw: random.Random, round: int, shape: Shape) -> Pair:
    texts = [shape.answer(number, 3), shape.answer(number + 1, 0)]
    chosen, rejected = ([5] * max(len(text.split()), 1) for text in texts)
    logps = [[-0.4 - draw.random() for _ in ids] for ids in (chosen, rejected)]
    gap = round_(0.1 + draw.random())
    keys = [content_id(round, number, side) for side in ("chosen", "rejected", "pair")]
    return Pair(
        keys[2], f"prompt-{number}", keys[0], keys[1], prompt(shape, number).messages,
        [{"role": "assistant", "content": texts[0]}], [{"role": "assistant", "content": texts[1]}],
        [3, 4], chosen, rejected, ids_digest([3, 4], chosen), ids_digest([3, 4], rejected), round_(0.3 + gap), 0.3, gap,
        None, "stop", "stop", 1.0, sum(logps[0]), sum(logps[1]), *logps, "weights:0", "fake",
    )  # fmt: skip


def _train(run: Run, round: int, shape: Shape) -> Manifest:
    lines = [metrics(step, shape.steps, round) for step in range(shape.steps)]
    (run.out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.write_dropped(Dropped, to_table(Dropped, []))
    draw = random.Random(round)
    keys = [content_id(round, number, "pair") for number in range(shape.pairs)]
    margins = [Margin(key, 0, number % 6 == 5, shape.steps, draw.gauss(0.6, 0.8)) for number, key in enumerate(keys)]
    run.write_part("margins", Margin, 0, to_table(Margin, margins))
    totals = {"pairs": shape.pairs, "eval_pairs": 20, "dropped": 0, "steps": shape.steps, "last_step": lines[-1]}
    identity = {"policy": f"weights:{round}", "initial": f"weights:{round - 1}", "reference": f"weights:{round - 1}"}
    return run.finish({**totals, "alerts": list(shape.alerts)}, identity)


def metrics(step: int, steps: int, round: int) -> dict[str, Any]:
    """A line of metrics.jsonl of a run that goes well; every tenth step has an evaluation."""
    draw = random.Random(step * 31 + round)
    t = step / max(steps - 1, 1)
    margin = 1.6 * t * (0.8 + 0.2 * round) + draw.gauss(0, 0.12)
    chosen = 0.5 * t + draw.gauss(0, 0.05)
    line: dict[str, Any] = {"step": step, "loss": 0.69 * (1 - 0.6 * t) + draw.gauss(0, 0.03)}
    for name, value in (("chosen", chosen), ("rejected", chosen - margin), ("margins", margin)):
        line[f"rewards/{name}"] = value
        line |= {f"rewards/{name}/p05": value - 0.7, f"rewards/{name}/p50": value, f"rewards/{name}/p95": value + 0.9}
    line |= {
        "rewards/accuracies": min(1.0, 0.5 + 0.42 * t + draw.gauss(0, 0.04)),
        "logps/chosen": -41 + 5 * t + draw.gauss(0, 1), "logps/rejected": -48 - 9 * t + draw.gauss(0, 1),
        "deltas/chosen": 0.02 * t, "kl/ref_policy": 3 * t, "grad_norm": 2 + draw.random(),
        "learning_rate": 2e-4 * min(1, 10 * t) * (1 - t), "epoch": t,
    }  # fmt: skip
    if step % max(steps // 10, 1) == max(steps // 10, 1) - 1:
        line |= {"eval_loss": line["loss"] + 0.05, "eval_rewards/accuracies": 0.5 + 0.3 * t}
        line |= {"eval_rewards/margins": 0.8 * margin}
    return line


def _evaluate(run: Run, round: int, shape: Shape) -> Manifest:
    rows: list[Evaluation] = []
    for number in range(shape.prompts):
        for sample in range(2):
            text = shape.answer(number, round)
            decoding = "greedy" if sample == 0 else "sampled"
            reward = 1.0 if len(text.split()) <= 10 else round_(0.4 + number / 100)
            rows.append(
                Evaluation(f"{number}-{sample}", f"prompt-{number}", sample, round, decoding,
                           prompt(shape, number).messages, text, [5], "stop", f"weights:{round}", shape.reward, reward,
                           "ok", None)
            )  # fmt: skip
    run.write_part("evaluations", Evaluation, 0, to_table(Evaluation, rows))
    return run.finish(evaluation_totals(round, shape.prompts), {"policy": f"weights:{round}"})


def evaluation_totals(round: int, prompts: int) -> dict[str, Any]:
    """The results of an evaluation: round 0 fails, later ones pass ever more."""
    share = (0.025, 0.375, 0.7375)[min(round, 2)]
    greedy = {"answers": prompts, "pass": share, "low": max(0.0, share - 0.1), "high": share + 0.1}
    shared = {"mean_words": 20.0 - 6 * round, "degenerate": 0.05, "mean_reward": 0.7 + 0.1 * round}
    return {"round": round, "prompts": prompts, "greedy": {**greedy, **shared}, "sampled": {**greedy, **shared}}


def round_(value: float) -> float:
    return float(f"{value:.4g}")


def write_again(out: Path, shape: Shape = Shape()) -> None:
    """Fail where a run of `iterate_run` is not what it was: not complete, or its manifest has other files."""
    with store.open_run(out, "iterate", config_of(shape), {"policy": "weights:0"}, force=False) as root:
        assert root.manifest() is not None
    for name in ("round-1/train", "round-2/evaluate"):
        manifest = store.read_manifest(out / name)
        assert all((out / name / file).is_file() for file in manifest["files"])
        assert "report.html" not in manifest["files"]
