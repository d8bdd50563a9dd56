"""The numbers of an experiment as a page in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments import EXPERIMENTS

WORDS = {
    "sampled": "right, sampled", "greedy": "right, greedy", "closeness": "closeness, sampled", "kl": "KL to the start",
}  # fmt: skip
SIGNS = {1: "above", -1: "below", 0: "no different from"}


def page(found: Mapping[str, Any]) -> str:
    """The numbers as Markdown."""
    experiment, scale = EXPERIMENTS[found["name"]], found["scale"]
    head = [WORDS[measure] for measure in experiment.measures]
    settings = any(line["settings"] for line in found["arms"])
    expected = [
        f"| {WORDS[h['measure']]}: {h['arm']} {SIGNS[h['sign']]} {h['other']} | {h['why']} | "
        + (
            f"{_cell(h['measure'], h, 'difference', signed=True)} | {_each(h['measure'], h, signed=True)}"
            if "seeds" in h
            else " | "
        )
        + f" | {h['outcome']} |"
        for h in found["hypotheses"]
    ]
    return "\n".join(
        [
            f"# {found['title']}",
            "",
            f"    {found['command']}",
            "",
            " ".join((experiment.run.__doc__ or "").split()),
            "",
            f"The task is `benchmarks/addition.py`: {scale['prompts']} prompts to train on, eight answers to each, "
            f"{scale['held_out']} held-out prompts with a greedy and two sampled answers, seeds "
            f"{', '.join(map(str, scale['seeds']))}, of which each has a start of its own. Square brackets have 95 % "
            "intervals over the prompts of all seeds, paired by prompt for differences; beside them stands what each "
            "seed gives alone. Right answers are in percent, closeness too; KL is k3 in nats per answer.",
            "",
            f"Commit {found['commit']}, {', '.join(map(' '.join, found['versions'].items()))}, {found['cpu_seconds']} "
            f"CPU seconds with one thread. Raw numbers: [{found['name']}.json]({found['name']}.json).",
            "",
            "## Expected before the run, and what came out",
            "",
            "| expected | why | difference | each seed | outcome |",
            "|---|---|---|---|---|",
            *expected,
            "",
            "## Every arm",
            "",
            "| " + " | ".join(["arm", *head, f"{head[0]}, each seed", *(["settings"] if settings else [])]) + " |",
            "|---" * (len(head) + 2 + settings) + "|",
            *(_row(line, experiment.measures, settings=settings) for line in found["arms"]),
            "",
        ]
    )  # fmt: skip


def _row(line: Mapping[str, Any], measures: Sequence[str], *, settings: bool) -> str:
    failures = [f"seed {seed} failed: {message}" for seed, message in line["failures"].items()]
    cells = [_cell(measure, line[measure], "value") if measure in line else "" for measure in measures]
    each = _each(measures[0], line[measures[0]]) if measures[0] in line else ""
    last = [line["settings"]] if settings else []
    return "| " + " | ".join([line["name"], *cells, "; ".join([each, *failures]), *last]) + " |"


def _number(measure: str, value: float, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{value:{sign}.2f}" if measure == "kl" else f"{100 * value:{sign}.1f}"


def _cell(measure: str, found: Mapping[str, Any], key: str, *, signed: bool = False) -> str:
    low, high = (found[f"{key}_{end}" if key == "difference" else end] for end in ("low", "high"))
    value, *ends = (_number(measure, x, signed=signed) for x in (found[key], low, high))
    return f"{value} [{', '.join(ends)}]"


def _each(measure: str, found: Mapping[str, Any], *, signed: bool = False) -> str:
    return ", ".join(_number(measure, value, signed=signed) for value in found["seeds"].values())
