"""Results of variants on held-out rows: numbers with intervals, the best variant, and which ones may be as good as it.

All variants have the same held-out rows and prompts. Two variants are compared on the same rows, paired by prompt.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefpipe import statistics
from prefpipe.config.grid import Variant
from prefpipe.errors import DataError
from prefpipe.runs import logs, manifests, store
from prefpipe.schemas import Evaluation, Margin, Measure, from_table
from prefpipe.statistics import Estimate

Key = tuple[str, int]  # id of a row, and number of its source
ByPrompt = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Result:
    """The result of a variant.

    state: complete, stopped (after `steps`) or failed (`why`)
    values: numbers by name, each with its interval, or None for both ends
    by_prompt: by metric, the values whose mean it is, for paired comparisons
    """

    variant: Variant
    state: str
    steps: int
    policy: str = ""
    why: str = ""
    values: Mapping[str, tuple[float, float | None, float | None]] = field(default_factory=dict[str, Any])
    by_prompt: Mapping[str, ByPrompt] = field(default_factory=dict[str, ByPrompt])

    def as_json(self) -> dict[str, Any]:
        """The result as an entry of the manifest and of sweep.json."""
        numbers = {name: {"value": v, "low": low, "high": high} for name, (v, low, high) in self.values.items()}
        return {
            "name": self.variant.name,
            "settings": dict(self.variant.changes),
            "state": self.state,
            "steps": self.steps,
            **({"policy": self.policy} if self.policy else {}),
            **({"why": self.why} if self.why else {}),
            "values": numbers,
        }

    def rows(self) -> Iterable[Measure]:
        """The numbers as rows of the dataset `measures`."""
        for name, (value, low, high) in self.values.items():
            yield Measure(0, self.policy, self.variant.name, None, None, name, value, low, high)


@dataclass(frozen=True)
class Best:
    """The variant with the highest value of a metric, and the variants whose paired difference to it may be 0."""

    result: Result
    metric: str
    not_told_apart: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """The best variant as an entry of the manifest."""
        value, low, high = self.result.values[self.metric]
        return {
            "name": self.result.variant.name,
            "metric": self.metric,
            "value": value,
            "low": low,
            "high": high,
            "not_told_apart": list(self.not_told_apart),
        }

    @property
    def sentence(self) -> str:
        """The best variant in words, with the variants that are not told apart from it."""
        value, low, high = self.result.values[self.metric]
        text = f"best by {self.metric}: {self.result.variant.name}, {value:.4g} [{low:.4g}, {high:.4g}]"
        if not self.not_told_apart:
            return f"{text}; every other variant is below it"
        others = ", ".join(self.not_told_apart[:4]) + (", ..." if self.not_told_apart[4:] else "")
        return f"{text}; not told apart from it: {len(self.not_told_apart)} ({others})"


def read(variant: Variant, place: Path, prompts: Mapping[Key, str], evaluation: Path | None, start: Path) -> Result:
    """The result of the variant whose run is in `place`.

    prompts: the prompt of every held-out row
    evaluation: the complete evaluation of the variant; None where the sweep has no recipe of evaluate
    start: the evaluation of the initial policy
    """
    if not (place / "manifest.json").exists():
        lines = held_out(place)
        return Result(variant, "stopped", max((line["step"] + 1 for line in lines), default=0))
    manifest = store.read_manifest(place)
    totals = manifest["totals"]
    values: dict[str, tuple[float, float | None, float | None]] = {}
    by_prompt: dict[str, ByPrompt] = {}
    margins = _margins(variant, place, prompts)
    if margins:
        wins = {p: [float(m > 0) + 0.5 * (m == 0) for m in group] for p, group in margins.items()}
        by_prompt |= {"accuracy": wins, "margin": margins}
        values["accuracy"] = statistics.share(list(wins.values()))
        values["margin"] = statistics.mean(list(margins.values()))
    step = totals.get("best", {}).get("step", totals["steps"])
    line = next((line for line in held_out(place) if line["step"] + 1 == step), {})
    for name, key in (("loss", "eval_loss"), ("kl_ref_policy", "eval_kl/ref_policy")):
        if isinstance(line.get(key), int | float):
            values[name] = (line[key], None, None)
    if evaluation is not None:
        values |= _evaluated(evaluation)
        by_prompt["win_rate"] = _outcomes(evaluation, start)
    return Result(variant, "complete", totals["steps"], manifest["identity"]["policy"], "", values, by_prompt)


def at_step(variant: Variant, place: Path, step: int, metric: str) -> float | None:
    """The metric of a variant on held-out rows at a step; None for a run that has not reached it. A run that ended
    before has the value of its last evaluation."""
    lines = [line for line in held_out(place) if line["step"] + 1 <= step]
    if not lines or (lines[-1]["step"] + 1 < step and not (place / "manifest.json").exists()):
        return None
    value = lines[-1].get({"accuracy": "eval_rewards/accuracies", "margin": "eval_rewards/margins"}[metric])
    if value is None:
        return None
    return value / variant.config.beta if metric == "margin" else value


def best(results: Sequence[Result], metric: str) -> Best:
    """The variant with the highest value of the metric, the first of equal ones. Raises DataError where none has a
    value."""
    rated = [result for result in results if metric in result.values]
    if not rated:
        failed = next((f": {result.variant.name}: {result.why}" for result in results if result.why), "")
        raise DataError(
            f"no variant has {metric}{failed}",
            "losses without a reference have it only on rows with cached log-probs: score the rows first, or give an "
            "evaluate recipe and metric_for_best_variant = win_rate",
        )
    winner = max(rated, key=lambda result: result.values[metric][0])
    others = [r.variant.name for r in rated if r is not winner and not _is_below(r, winner, metric)]
    return Best(winner, metric, others)


def held_out(place: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that hold an evaluation."""
    return [dict(line) for line in logs.lines(place / "metrics.jsonl") if "eval_loss" in line and "step" in line]


def _is_below(result: Result, winner: Result, metric: str) -> bool:
    """Whether a variant is below the best one: the 95 % interval of the difference, paired by prompt, is above 0."""
    ours, theirs = winner.by_prompt[metric], result.by_prompt[metric]
    differences = [[a - b for a, b in zip(ours[p], theirs[p], strict=True)] for p in ours if p in theirs]
    if metric == "margin":
        return statistics.mean(differences).low > 0
    return statistics.paired([sum(group) / len(group) for group in differences]).low > 0


def _margins(variant: Variant, place: Path, prompts: Mapping[Key, str]) -> dict[str, list[float]]:
    """The log-ratio margin h (nats) of every held-out row, by prompt. A run stores margins as beta * h."""
    manifest = store.read_manifest(place)
    if "margins" not in manifests.datasets(manifest):
        return {}
    found: dict[str, list[float]] = defaultdict(list)
    rows = from_table(Margin, store.read_dataset(place, "margins", Margin))
    for row in sorted((row for row in rows if row.held_out), key=lambda row: (row.row_id, row.source)):
        found[prompts[row.row_id, row.source]].append(row.margin / variant.config.beta)
    return found


def _evaluated(run_dir: Path) -> dict[str, Estimate | tuple[float, float | None, float | None]]:
    totals = store.read_manifest(run_dir)["totals"]
    against, greedy = totals["comparisons"][0]["greedy"], totals["greedy"]
    found: dict[str, Any] = {"win_rate": (against["win_rate"], against["low"], against["high"])}
    found["pass"] = (greedy["pass"], greedy["low"], greedy["high"])
    found["length"] = tuple(greedy[f"mean_tokens{end}"] for end in ("", "_low", "_high"))
    for divergence in totals.get("kl", ()):
        found[f"kl_policy_{Path(divergence['to']).name}"] = tuple(
            divergence["per_sequence"][f"k1{end}"] for end in ("", "_low", "_high")
        )
    return found


def _outcomes(run_dir: Path, start: Path) -> dict[str, list[float]]:
    """For each prompt: 1 where the greedy answer has a higher reward than that of the initial policy, 0.5 for an equal,
    0 for a lower one."""
    ours, theirs = _rewards(run_dir), _rewards(start)
    return {p: [0.5 + 0.5 * ((ours[p] > theirs[p]) - (ours[p] < theirs[p]))] for p in ours if p in theirs}


def _rewards(run_dir: Path) -> dict[str, float]:
    rows = from_table(Evaluation, store.read_dataset(run_dir, "evaluations", Evaluation))
    return {r.prompt_id: r.reward for r in rows if r.decoding == "greedy" and r.reward is not None}
