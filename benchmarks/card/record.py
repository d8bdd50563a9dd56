"""What the checks have said so far: figures with their goals, states, a JSON file after each of them, and the table."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STATES = ("waiting", "running", "done", "cut", "failed", "left out")


@dataclass(frozen=True)
class Figure:
    """A measured number, and the goal that it should reach or, with `at_most`, not pass."""

    name: str
    value: float
    unit: str = ""
    goal: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the goal is met, None without one. No number meets no goal."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal


@dataclass(frozen=True)
class Fact:
    """What a check says in words, such as a version."""

    name: str
    text: str


class Record:
    """The checks of a run in their order. Every change is written to the file at once, which is whole at any moment."""

    def __init__(self, path: Path, command: str, names: list[str]) -> None:
        self._path = path
        self.content: dict[str, Any] = {
            "command": command,
            "checks": [
                {"name": name, "state": "waiting", "why": "", "seconds": None, "facts": {}, "figures": []}
                for name in names
            ],
        }
        self._write()

    def take(self, event: dict[str, Any]) -> None:
        """Note an event of a worker: a check starts, ends with a state, or says a figure or a fact."""
        check = next(c for c in self.content["checks"] if c["name"] == event["check"])
        if event["kind"] == "figure":
            figure = Figure(**event["figure"])
            finite = math.isfinite(figure.value)  # JSON has no NaN
            check["figures"].append({**asdict(figure), "value": figure.value if finite else None, "met": figure.met})
        elif event["kind"] == "fact":
            check["facts"][event["name"]] = event["text"]
        else:
            check |= {key: event[key] for key in ("state", "why", "seconds") if key in event}
        self._write()

    def _write(self) -> None:
        part = self._path.with_name(f"{self._path.name}.part")
        part.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")
        part.replace(self._path)


def table(content: dict[str, Any]) -> str:
    """A record as Markdown: the machine, the figures of every check, the checks that are not whole, the goals."""
    lines = [f"    {content['command']}", ""]
    for check in content["checks"]:
        lines += [f"- {name}: {text}" for name, text in check["facts"].items()]
    lines += ["", "| check | figure | value | unit | goal | |", "|---|---|---|---|---|---|"]
    for check in content["checks"]:
        for figure in check["figures"]:
            goal = "" if figure["goal"] is None else f"{'<=' if figure['at_most'] else '>='} {figure['goal']:g}"
            value = "no number" if figure["value"] is None else f"{figure['value']:.4g}"
            cells = (check["name"], figure["name"], value, figure["unit"], goal, _verdict(figure["met"]))
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| check | state | seconds | why |", "|---|---|---|---|"]
    for check in content["checks"]:
        seconds = "" if check["seconds"] is None else f"{check['seconds']:.0f}"
        lines.append(f"| {check['name']} | {check['state']} | {seconds} | {check['why']} |")
    goals = [figure["met"] for check in content["checks"] for figure in check["figures"] if figure["goal"] is not None]
    whole = sum(check["state"] == "done" for check in content["checks"])
    lines += ["", f"{sum(goals)} of {len(goals)} goals met; {whole} of {len(content['checks'])} checks done."]
    return "\n".join(lines)


def _verdict(met: bool | None) -> str:  # noqa: FBT001  (a cell)
    return {True: "met", False: "MISSED", None: ""}[met]
