"""The playground: losses against the margin, this run's margins below them, and the best policy on its candidates.

curves.json holds every loss and its pull -dL/dh over a grid of margins and settings, computed by the losses themselves
(tests/stages/report/grid.py; a test compares the two). The page draws a line of the grid relative to its value at a
margin of 0, so that all losses share two axes.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import product
from typing import Any

from markupsafe import Markup

from prefpipe.runs import overview
from prefpipe.runs.overview import Overview
from prefpipe.schemas import RefLogps, Reward
from prefpipe.stages.report import charts
from prefpipe.stages.report.answers import prompt_texts
from prefpipe.stages.report.charts import Chart, is_number
from prefpipe.stages.report.data import completion_rows, reward_names
from prefpipe.stages.report.subject import Subject, label, margins, number, percent
from prefpipe.stages.report.texts import shown

SIZE = (420, 220)  # pixels of a frame
REACH = 40.0  # nats to both sides of a margin of 0
FRAMES = {"loss": (-0.5, 3.0), "pull": (-1.0, 2.0)}  # the ends of the vertical axis, relative to a margin of 0
POLICY_BETAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_MOST_PROMPTS = 12
_MOST_ROWS = 4_000
_MOST_MARGINS = 5_000  # in the histogram
_LONGEST = 280


@dataclass(frozen=True)
class Candidate:
    """A completion of a prompt: its reward, its share under the reference among the candidates, and under the best
    policy at every beta of POLICY_BETAS."""

    text: str
    reward: str
    reference: float
    best: Sequence[float]


@dataclass(frozen=True)
class Candidates:
    """The candidates of a prompt."""

    prompt: str
    rows: Sequence[Candidate]


@dataclass(frozen=True)
class Playground:
    """Section 6 of the page. `start` is where the sliders stand: the loss and the places of its settings."""

    frames: Mapping[str, Chart]
    margins: Chart | None
    start: Mapping[str, Any]
    betas: Sequence[float]
    prompts: Sequence[Candidates]
    reward: str


def playground(subject: Subject) -> Playground:
    """Section 6, from the newest run of training and the newest completions."""
    trained, sampled = subject.of("train"), subject.of("generate", "score")
    start = _start(trained[-1].config if trained else {})
    histogram = _margins(trained[-1]) if trained else None
    prompts, reward = _candidates(sampled[-1]) if sampled else ([], "")
    return Playground({name: _frame(name, start) for name in FRAMES}, histogram, start, POLICY_BETAS, prompts, reward)


@cache
def curves() -> Mapping[str, Any]:
    """The grid of curves.json: `margins` in nats, and for each of `losses` its `settings` with their values, and
    `loss` and `pull`, a list over the margins for each point of the product of the settings, the last one fastest."""
    return json.loads(resources.files("prefpipe.stages.report").joinpath("curves.json").read_text("utf-8"))


def best_policy(ref_logps: Sequence[float], rewards: Sequence[float], beta: float) -> list[float]:
    """The policy proportional to reference * exp(reward / beta) on the candidates (2305.18290, eq. 4), in shares."""
    scores = [logp + reward / beta for logp, reward in zip(ref_logps, rewards, strict=True)]
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights]


def _start(config: Mapping[str, Any]) -> dict[str, Any]:
    """The loss of a run and, for each of its settings, the place of the value nearest to that of the run."""
    named = config.get("loss_type")
    name = named[0] if isinstance(named, list) and named and named[0] in curves()["losses"] else "sigmoid"
    values = {"beta": 0.1, "label_smoothing": 0.0, "simpo_gamma_beta_ratio": 0.5, **config}
    places = {
        setting: min(range(len(stops)), key=lambda i, stops=stops, setting=setting: abs(stops[i] - values[setting]))
        for setting, stops in curves()["losses"][name]["settings"].items()
    }
    return {"loss": name, "places": places}


def _frame(which: str, start: Mapping[str, Any]) -> Chart:
    """The axes with the curve of the run, drawn by Vega; the page moves the line."""
    of = curves()["losses"][start["loss"]]
    points = list(product(*(range(len(stops)) for stops in of["settings"].values())))
    curve = of[which][points.index(tuple(start["places"].values()))]
    middle = curve[curves()["margins"].index(0)]
    values = [{"h": h, "v": v / middle} for h, v in zip(curves()["margins"], curve, strict=True)]
    x = charts.quantity("h", "margin h, nats", scale={"domain": [-REACH, REACH], "nice": False})
    y = charts.quantity("v", None, scale={"domain": list(FRAMES[which]), "nice": False})
    mark = {"type": "line", "clip": True, "color": charts.ACCENT, "strokeWidth": 2}
    svg = charts.plot(values, mark, {"x": x, "y": y}, SIZE)
    title = {"loss": "Loss", "pull": "Pull on the margin (gradient weight)"}[which]
    unique = re.sub(r"\bclip\d+", f"{which}-clip", svg)  # an id is one of the whole page
    return Chart(title, "relative to its value at a margin of 0", Markup(unique))


def _margins(run: Overview) -> Chart | None:
    """The newest margins of the pairs of a run, in nats, those beyond the frame at its ends."""
    rows, beta = margins(run), run.config.get("beta")
    if not rows or not isinstance(beta, float) or not beta:
        return None
    few = rows[:: -(-len(rows) // _MOST_MARGINS)]
    names = {False: "trained on", True: "held out"}
    values = [{"value": max(-REACH, min(REACH, row["margin"] / beta)), "series": names[row["held_out"]]} for row in few]
    colours = dict(zip(names.values(), (charts.ACCENT, charts.SECOND), strict=True))
    series = {name: colour for name, colour in colours.items() if any(row["series"] == name for row in values)}
    size = (SIZE[0], SIZE[1] // 2)
    svg = charts.histogram(values, "margin h, nats", series=series, domain=(-REACH, REACH), size=size)
    nats = sorted(row["margin"] / beta for row in rows)
    above = percent(sum(value > 0 for value in nats) / len(nats))
    says = f"median {number(nats[len(nats) // 2])} nats, {above} above 0; {number(len(rows))} pairs of {label(run)}"
    return Chart("Margins of this run's pairs", says, svg, "Where the curve above is flat, a pair teaches no more.")


def _candidates(run: Overview) -> tuple[list[Candidates], str]:
    """The first prompts whose candidates have different rewards, and the name of the reward."""
    names = reward_names(run)
    if not names or not run.has("ref_logps") or not run.has("completions"):
        return [], ""
    rewards = _column(run, f"rewards/{names[0]}", Reward, "reward")
    logps = _column(run, "ref_logps", RefLogps, "ref_logps")
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in completion_rows(run, _MOST_ROWS).rows:
        if is_number(rewards.get(row["completion_id"])) and row["completion_id"] in logps:
            by_prompt.setdefault(row["prompt_id"], []).append(row)
    telling = {key: rows for key, rows in by_prompt.items() if len({rewards[row["completion_id"]] for row in rows}) > 1}
    chosen = dict(list(telling.items())[:_MOST_PROMPTS])
    prompts = prompt_texts(run, list(chosen))
    found = [_of_prompt(prompts.get(key, key), rows, rewards, logps) for key, rows in chosen.items()]
    return found, shown(names[0], 80)


def _of_prompt(
    prompt: str, rows: Sequence[Mapping[str, Any]], rewards: Mapping[str, Any], logps: Mapping[str, Any]
) -> Candidates:
    rated = [rewards[row["completion_id"]] for row in rows]
    likely = [logps[row["completion_id"]] for row in rows]
    reference = best_policy(likely, [0.0] * len(rows), 1.0)
    best = [best_policy(likely, rated, beta) for beta in POLICY_BETAS]
    return Candidates(
        shown(prompt, _LONGEST),
        [
            Candidate(
                shown(row["text"], _LONGEST), number(rated[i]), reference[i], [round(shares[i], 6) for shares in best]
            )
            for i, row in enumerate(rows)
        ],
    )


def _column(run: Overview, dataset: str, row_type: type, column: str) -> dict[str, Any]:
    rows = overview.rows(run, dataset, row_type, _MOST_ROWS, ["completion_id", column]).rows
    return {row["completion_id"]: row[column] for row in rows}
