"""What `prefpipe iterate` prints at its end: the rounds, the best one, what stopped it, answers, and paths."""

import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

from prefpipe.runs import logs, store
from prefpipe.runs.store import Manifest
from prefpipe.schemas import Evaluation, from_table

_NUM_PROMPTS_SHOWN = 3
_NUM_ROUNDS_SHOWN = 5
_STEPS = ("generate", "score", "build-pairs", "replay", "train", "evaluate")  # of a round, in their order
_WIDTH = 110  # characters of an answer
_COLUMNS = (("mean_words", ".1f"), ("degenerate", ".1%"), ("mean_reward", ".3f"))  # of the table: total, format


def lines(manifest: Manifest, out: Path) -> list[str]:
    """The results round by round, some answers of each round, the paths of the files, and what to run next."""
    totals = manifest["totals"]
    rounds = totals["rounds"]
    last = out / f"round-{rounds[-1]['round']}"
    best = totals.get("best")  # a run of an older version names none
    chosen = out / f"round-{best['round']}" if best else last
    trained_on = next(name for name in ("pairs", "labels", "groups") if (last / "build-pairs" / name).is_dir())
    return [
        "",
        *_table(rounds, best["round"] if best else None),
        "",
        *_times(out, _shown(rounds, best["round"] if best else 0)),
        *([_best(best)] if best else []),
        *_stopped(totals.get("stopped")),
        "",
        *_answers(out, _shown(rounds, best["round"] if best else 0)),
        *_policy(out, chosen),
        f"{trained_on:<12} {last}/build-pairs/{trained_on}/*.parquet",
        f"completions  {last}/generate/completions/*.parquet, ref_logps/, rewards/",
        f"answers      {out}/round-*/evaluate/evaluations/*.parquet",
        f"metrics      {last}/train/metrics.jsonl",
        f"replay       prefpipe train {last}/train.json --out runs/replay",
        *([] if totals.get("stopped") else [f"more rounds  the same command with --rounds {rounds[-1]['round'] + 1}"]),
        "next         prefpipe config iterate > mine.toml   (put your model, prompts and rewards in)",
        "             prefpipe iterate mine.toml --out runs/mine",
    ]


def _best(best: dict[str, Any]) -> str:
    if best["round"] == 0:
        return f"best: no round; {best['metric']} was {best['value']:.4g} before training, and no round is above it"
    return f"best: round {best['round']}, {best['metric']} {best['value']:.4g}"


def _stopped(stop: dict[str, Any] | None) -> list[str]:
    if stop is None:
        return []
    return [
        f"stopped after round {stop['round']} by rule {stop['rule']}:",
        *(f"  {line}" for line in stop["why"]),
        f"  next: {stop['advice']}",
        f"  to go on all the same: the same command without '{stop['rule']}' in stop.rules",
    ]


def _policy(out: Path, chosen: Path) -> list[str]:
    if chosen.name == "round-0":
        return ["policy       the model before training: no round is better"]
    linked = out / "best" if (out / "best").is_symlink() else None
    if (chosen / "train" / "model").is_dir():
        return [f"policy       {linked or chosen / 'train/model'} (loads with transformers and vLLM)"]
    return [f"policy       {linked or chosen / 'train/adapter'} (PEFT; loads with peft, transformers and vLLM)"]


def _table(rounds: list[dict[str, Any]], best: int | None) -> list[str]:
    head = ["round", "greedy pass [95 %]", "sampled pass [95 %]", "mean words", "degenerate", "mean reward"]
    rows = [head, ["---"] * len(head)]
    for totals in rounds:
        number = totals["round"]
        greedy, sampled = totals["greedy"], totals["sampled"]
        rows.append(
            [
                ("start" if number == 0 else str(number)) + (" (best)" if number == best else ""),
                *(f"{d['pass']:.1%} [{d['low']:.1%}, {d['high']:.1%}]" for d in (greedy, sampled)),
                *(f"{greedy[k]:{form}} / {sampled[k]:{form}}" for k, form in _COLUMNS),
            ]
        )
    count = rounds[0]["prompts"]
    return [*_aligned(rows), "", f"{count} held-out prompts; the last three columns are greedy / sampled answers."]


def _times(out: Path, numbers: list[int]) -> list[str]:
    """How long the steps of some rounds took, and all of them; nothing where no step is noted, as in a run of an older
    version. A step that was killed is noted when it has come to its end."""
    seconds: Counter[tuple[str, str]] = Counter()
    for line in logs.lines(out / "timing.jsonl"):
        if line.get("event") == "step":
            of, _, step = line["step"].partition("/")
            seconds[of, step] += line["seconds"]
    if not seconds:
        return []
    steps = [name for name in _STEPS if any(step == name for _, step in seconds)]
    rows = [["seconds", *steps], ["---"] * (len(steps) + 1)]
    for number in numbers:
        of = f"round-{number}"
        rows.append([str(number or "start"), *(f"{seconds[of, s]:.0f}" if (of, s) in seconds else "" for s in steps)])
    rows.append(["all", *(f"{sum(t for (_, name), t in seconds.items() if name == s):.0f}" for s in steps)])
    return [*_aligned(rows), ""]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]


def _shown(rounds: list[dict[str, Any]], best: int) -> list[int]:
    """The rounds whose answers are shown: every one, or of many the start, the best and the last."""
    numbers = [int(totals["round"]) for totals in rounds]
    return numbers if len(numbers) <= _NUM_ROUNDS_SHOWN else sorted({0, best, numbers[-1]})


def _answers(out: Path, numbers: list[int]) -> list[str]:
    """The greedy answers of some rounds to the first prompts."""
    by_round = {number: _greedy_answers(out / f"round-{number}/evaluate") for number in numbers}
    shown: list[str] = []
    for prompt_id in list(by_round[0])[:_NUM_PROMPTS_SHOWN]:
        shown.append(f"> {by_round[0][prompt_id].messages[-1]['content']}")
        for number, answers in by_round.items():
            name = "start" if number == 0 else f"round {number}"
            shown.append(f"  {name:<8} {textwrap.shorten(answers[prompt_id].text, _WIDTH, placeholder=' ...')}")
        shown.append("")
    return shown


def _greedy_answers(run_dir: Path) -> dict[str, Evaluation]:
    rows = from_table(Evaluation, store.read_dataset(run_dir, "evaluations", Evaluation))
    return {row.prompt_id: row for row in rows if row.decoding == "greedy"}
