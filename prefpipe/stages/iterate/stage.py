"""`prefpipe iterate stages/iterate/demo.toml --out DIR`: rounds of generate -> build-pairs -> train -> evaluate.

1. Identify the model and the prompts.
2. Plan the steps: an evaluation before training (round 0), then four steps per round, each linked to those before it.
3. Run each step in a process of its own, which frees its memory. Its saved config replays it.
4. Write the manifest: the results of every evaluation.

    DIR/round-0/evaluate           the policy before training
    DIR/round-1/generate.json      the config of a step: `prefpipe generate THIS.json --out RUN` replays it
    DIR/round-1/generate/          its run directory

A step that is complete says so and does nothing; a killed one resumes where it was cut.
"""

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from prefpipe import clock, log, processes
from prefpipe.config.base import dump
from prefpipe.config.iterate import IterateConfig
from prefpipe.config.reward_sum import parse
from prefpipe.config.shared import REWARD_CHOICES
from prefpipe.errors import PrefpipeError, UsageError
from prefpipe.ids import canonical_json
from prefpipe.models import policy
from prefpipe.runs import fsio, page, store
from prefpipe.runs.store import Manifest
from prefpipe.schemas import Evaluation, from_table

Runner = Callable[[str, Path, Path], None]  # command, saved config, run directory
_NUM_PROMPTS_SHOWN = 3
_WIDTH = 110  # characters of an answer in the summary
_COLUMNS = (("mean_words", ".1f"), ("degenerate", ".1%"), ("mean_reward", ".3f"))  # of the table: total, format


@dataclass(frozen=True)
class Step:
    """One command of one round."""

    round: int
    command: str
    config: BaseModel

    @property
    def name(self) -> str:
        """Its folder inside OUT."""
        return f"round-{self.round}/{self.command}"


def run(config: IterateConfig, out: Path, *, force: bool, runner: Runner | None = None) -> Manifest:
    """Run every step that is not complete. `runner` runs a step (by default in a process)."""
    if not config.train.learning_rate:
        config = config.model_copy(update={"train": config.train.resolved})
        log.info(f"train.learning_rate = {config.train.learning_rate:g}: the default of tuning = {config.train.tuning}")
    if config.report:
        page.check_installed()
    with store.open_run(out, "iterate", config, _inputs(config), force=force) as run_dir:
        manifest = run_dir.manifest(lambda m: all(_is_unchanged(out / name, d) for name, d in m["identity"].items()))
        if manifest is not None:
            return manifest
        plan = list(steps(config, out))
        start = clock.monotonic()
        for number, step in enumerate(plan, start=1):
            log.info(f"[{number}/{len(plan)}] round {step.round}: {step.command}")
            saved = out / f"{step.name}.json"
            fsio.write_text(saved, canonical_json({"command": step.command, "config": dump(step.config)}) + "\n")
            (runner or run_process)(step.command, saved, out / step.name)
            if config.report and step.command == "evaluate" and number < len(plan):
                page.write(out)
        run_dir.log_timing(event="rounds", seconds=round(clock.monotonic() - start, 1))
        manifests = {step.name: store.read_manifest(out / step.name) for step in plan}
        rounds = [manifests[step.name]["totals"] for step in plan if step.command == "evaluate"]
        manifest = run_dir.finish({"rounds": rounds}, {name: m["digest"] for name, m in manifests.items()})
        if config.report:
            page.write(out)
        return manifest


def steps(config: IterateConfig, out: Path) -> Iterator[Step]:
    """Every step in order, with the links between them filled in.

    Round n samples from the policy of round n - 1 and trains it on. That policy is an adapter on the model or, with
    full fine-tuning, a model.
    """
    model, adapter = config.model, "none"
    yield _evaluation(config, 0, model, adapter)
    for number in range(1, config.rounds + 1):
        here = out / f"round-{number}"
        linked: dict[str, Any] = {"model": model, "adapter": adapter}
        reference = "base" if config.reference == "base" else "policy"
        sampling = {**linked, "reference": reference, "seed": config.generate.seed + number}
        yield Step(number, "generate", config.generate.model_copy(update=sampling))
        yield Step(
            number, "build-pairs", config.build_pairs.model_copy(update={"completions": (str(here / "generate"),)})
        )
        training = {
            **linked,
            config.build_pairs.output: (str(here / "build-pairs"),),
            "seed": config.train.seed + number,
        }
        yield Step(number, "train", config.train.model_copy(update=training))
        if config.train.tuning == "full":
            model = str(here / "train" / "model")
        else:
            adapter = str(here / "train" / "adapter")
        yield _evaluation(config, number, model, adapter)


def run_process(command: str, saved: Path, out: Path) -> None:
    """Run one step as `python -m prefpipe COMMAND CONFIG --out DIR`. Raises an error with the exit code of the step."""
    words = processes.python("prefpipe", command, str(saved), "--out", str(out))
    process = subprocess.Popen(words, stdout=sys.stderr, env=processes.environment())
    try:
        code = process.wait()
    except BaseException:
        process.terminate()  # Ctrl-C reaches the step by itself; a SIGTERM reaches this process only
        process.wait()
        raise
    if code != 0:
        failed = PrefpipeError(
            f"{command} failed with exit code {code}", f"replay it alone: prefpipe {command} {saved} --out {out}"
        )
        failed.exit_code = code if code > 0 else 128 - code
        raise failed


def summary(manifest: Manifest, out: Path) -> list[str]:
    """The results round by round, some answers of each round, the paths of the files, and what to run next."""
    rounds = manifest["totals"]["rounds"]
    last = out / f"round-{len(rounds) - 1}"
    trained_on = next(name for name in ("pairs", "labels", "groups") if (last / "build-pairs" / name).is_dir())
    return [
        "",
        *_table(rounds),
        "",
        *_answers(out, len(rounds)),
        *_policy(last),
        f"{trained_on:<12} {last}/build-pairs/{trained_on}/*.parquet",
        f"completions  {last}/generate/completions/*.parquet, ref_logps/, rewards/",
        f"answers      {out}/round-*/evaluate/evaluations/*.parquet",
        f"metrics      {last}/train/metrics.jsonl",
        f"replay       prefpipe train {last}/train.json --out runs/replay",
        "next         prefpipe config iterate > mine.toml   (put your model, prompts and rewards in)",
        "             prefpipe iterate mine.toml --out runs/mine",
    ]


def _inputs(config: IterateConfig) -> dict[str, str]:
    """What identifies model and prompts. Raises UsageError without prompts, or rewards that the steps can find."""
    for table in ("generate", "evaluate"):
        if not getattr(config, table).prompts:
            raise UsageError(f"no prompts given for {table}", f"set prompts in the [{table}] table")
    parse(
        config.build_pairs.reward,
        config.generate.rewards,
        "the completions of [generate]",
        "set reward in the [build_pairs] table",
    )
    if not config.evaluate.reward:
        raise UsageError("no reward given for evaluate", f"set reward in the [evaluate] table: {REWARD_CHOICES}")
    return {
        "policy": policy.resolve(config.model).id,
        "generate.prompts": store.input_digest(Path(config.generate.prompts)),
        "evaluate.prompts": store.input_digest(Path(config.evaluate.prompts)),
    }


def _policy(last: Path) -> list[str]:
    if (last / "train" / "model").is_dir():
        return [f"policy       {last}/train/model (loads with transformers and vLLM)"]
    return [f"policy       {last}/train/adapter (PEFT; loads with peft, transformers and vLLM)"]


def _evaluation(config: IterateConfig, number: int, model: str, adapter: str) -> Step:
    update = {"model": model, "adapter": adapter, "round": number}
    return Step(number, "evaluate", config.evaluate.model_copy(update=update))


def _is_unchanged(run_dir: Path, digest: str) -> bool:
    return (run_dir / "manifest.json").exists() and store.read_manifest(run_dir)["digest"] == digest


def _table(rounds: list[dict[str, Any]]) -> list[str]:
    head = ["round", "greedy pass [95 %]", "sampled pass [95 %]", "mean words", "degenerate", "mean reward"]
    rows = [head, ["---"] * len(head)]
    for totals in rounds:
        greedy, sampled = totals["greedy"], totals["sampled"]
        rows.append(
            [
                "start" if totals["round"] == 0 else str(totals["round"]),
                *(f"{d['pass']:.1%} [{d['low']:.1%}, {d['high']:.1%}]" for d in (greedy, sampled)),
                *(f"{greedy[k]:{form}} / {sampled[k]:{form}}" for k, form in _COLUMNS),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    count = rounds[0]["prompts"]
    return [*lines, "", f"{count} held-out prompts; the last three columns are greedy / sampled answers."]


def _answers(out: Path, num_rounds: int) -> list[str]:
    """The greedy answers of every round to the first prompts."""
    by_round = [_greedy_answers(out / f"round-{n}/evaluate") for n in range(num_rounds)]
    lines: list[str] = []
    for prompt_id in list(by_round[0])[:_NUM_PROMPTS_SHOWN]:
        lines.append(f"> {by_round[0][prompt_id].messages[-1]['content']}")
        for number, answers in enumerate(by_round):
            name = "start" if number == 0 else f"round {number}"
            lines.append(f"  {name:<8} {textwrap.shorten(answers[prompt_id].text, _WIDTH, placeholder=' ...')}")
        lines.append("")
    return lines


def _greedy_answers(run_dir: Path) -> dict[str, Evaluation]:
    rows = from_table(Evaluation, store.read_dataset(run_dir, "evaluations", Evaluation))
    return {row.prompt_id: row for row in rows if row.decoding == "greedy"}
