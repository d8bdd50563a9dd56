"""How was it made? What came from what by digest, settings that differ from their defaults, versions, commands."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefpipe.config import base
from prefpipe.config.commands import CLASSES
from prefpipe.runs.overview import STEPS, Overview
from prefpipe.stages.report import charts
from prefpipe.stages.report.charts import Chart
from prefpipe.stages.report.subject import Subject, label
from prefpipe.stages.report.texts import shown
from prefpipe.views import cost
from prefpipe.views.cost import Cost
from prefpipe.views.settings import flat

_LONGEST = 300  # characters of a value


@dataclass(frozen=True)
class Link:
    """Something that a run read or made: its name, its digest, and the run on this page that made it, if any."""

    name: str
    digest: str
    maker: str


@dataclass(frozen=True)
class Node:
    """A run in the lineage: what it read and what it made."""

    name: str
    state: str
    digest: str
    read: Sequence[Link]
    made: Sequence[Link]


@dataclass(frozen=True)
class Setting:
    """A setting with its value, and the default where that is another one."""

    name: str
    value: str
    default: str
    changed: bool


@dataclass(frozen=True)
class Made:
    """How one run was made: its settings, what it cost, and the command that makes it again."""

    name: str
    settings: Sequence[Setting]
    changed: int
    cost: Cost | None
    command: str


@dataclass(frozen=True)
class Origin:
    """Section 5 of the page."""

    nodes: Sequence[Node]
    graph: Chart | None
    runs: Sequence[Made]
    versions: Sequence[tuple[str, str]]
    gaps: Sequence[tuple[str, str]]


def origin(subject: Subject) -> Origin:
    """Section 5, from manifests, configs and timing.jsonl."""
    runs = [run for run in subject.runs if run.state != "not started"]
    every = runs if subject.root in runs else [subject.root, *runs]
    versions = {
        shown(name, 80): shown(version, 80)
        for run in every
        for name, version in (run.manifest.get("versions") or {}).items()
    }
    makers = _makers(runs)
    nodes = [_node(run, makers) for run in runs]
    return Origin(
        nodes,
        _graph(runs, nodes),
        [_made(run) for run in every],
        sorted(versions.items()),
        [(shown(gap.where, _LONGEST), shown(gap.why, 500)) for gap in subject.gaps],
    )


def _makers(runs: Sequence[Overview]) -> dict[str, str]:
    """The digest of every run, and the policy of every run of training -> the name of the run."""
    found = {str(run.manifest["digest"]): run.name for run in runs if run.manifest.get("digest")}
    policies = {_policy(run): run.name for run in runs if run.command == "train"}
    return {digest: shown(name, _LONGEST) for digest, name in {**policies, **found}.items() if digest}


def _node(run: Overview, makers: Mapping[str, str]) -> Node:
    inputs = run.manifest.get("inputs") or {}
    read = [Link(shown(name, 80), shown(of, 160), makers.get(str(of), "")) for name, of in inputs.items()]
    made = [Link("policy", shown(_policy(run), 160), "")] if run.command == "train" and _policy(run) else []
    return Node(shown(run.name, _LONGEST), run.state, shown(run.manifest.get("digest", ""), 80), read, made)


def _graph(runs: Sequence[Overview], nodes: Sequence[Node]) -> Chart | None:
    """The runs by command and round (or, without rounds, one after another), each joined to those that it read."""
    if len(runs) < 2:
        return None
    seen = Counter[str]()
    places: dict[str, dict[str, str]] = {}
    for run, node in zip(runs, nodes, strict=True):
        seen[run.command] += 1
        column = str(seen[run.command]) if run.round is None else label(run)
        places[node.name] = {"column": column, "row": run.command, "state": node.state}
    edges = [
        {**places[link.maker], "to_column": places[node.name]["column"], "to_row": places[node.name]["row"]}
        for node in nodes
        for link in node.read
        if link.maker in places
    ]
    columns = list(dict.fromkeys(place["column"] for place in places.values()))
    svg = charts.graph(list(places.values()), edges, columns, [step for step in STEPS if seen[step]])
    says = f"{len(runs)} runs, joined where one read what another made"
    return Chart("What came from what", says, svg, "The table below names them by their digests.")


def _policy(run: Overview) -> str:
    """The identity of the policy of a complete run."""
    return str((run.manifest.get("identity") or {}).get("policy") or "")


def _made(run: Overview) -> Made:
    settings = _settings(run)
    words = ["prefpipe", run.command, str(run.path / "config.json"), "--out", "runs/replay"]
    return Made(
        label(run) if run.round is None else shown(run.name, _LONGEST),
        settings,
        sum(setting.changed for setting in settings),
        cost.of(run.path),
        shown(shlex.join(words), 1000),
    )


def _settings(run: Overview) -> list[Setting]:
    """The settings of a run; those that this version does not have are shown as changed."""
    config_class = CLASSES.get(run.command)
    defaults = flat(base.dump(config_class())) if config_class else {}
    return [
        Setting(shown(name, 120), _text(value), _text(defaults.get(name)), value != defaults.get(name))
        for name, value in flat(run.config).items()
    ]


def _text(value: object) -> str:
    if isinstance(value, list):
        return shown(", ".join(map(str, value)) or "none", _LONGEST)
    return shown("none" if value in ("", None, {}) else value, _LONGEST)
