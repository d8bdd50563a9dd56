"""The variants of a sweep: all combinations of the values of some settings of train, or random draws."""

import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_origin

from pydantic import ValidationError

from prefpipe.config import base
from prefpipe.config.train import TrainConfig
from prefpipe.ids import content_id

_ROWS = (  # settings that change the rows, which of them are held out, or the values of their reference
    *("max_length", "max_prompt_length", "overlong", "special_tokens_in_prompts", "chat_template_kwargs"),
    *("template_changes", "column", "sft_column", "eval_split", "dtype", "load_in_4bit", "audit_rows"),
    "kl_bank_size",
)
_NOT_OF_A_VARIANT = {
    "eval_steps": "variants are compared after the same evaluations",
    "merge": "it writes the trained model once more",
}
_RANGE = re.compile(r"(?P<low>[-+.\de]+)\.\.(?P<high>[-+.\de]+?)(?P<log>:log)?", re.IGNORECASE)
_UNSAFE = re.compile(r"[^\w.]+")
_MOST, _MOST_PROBLEMS = 1000, 5
_LONGEST_NAME = 120
_DIGITS = 3  # significant digits of a drawn number, which is part of the name of the variant


@dataclass(frozen=True)
class Variant:
    """A run of a sweep: its folder, the settings in which it differs, and all of its settings."""

    name: str
    changes: Mapping[str, Any]
    config: TrainConfig


@dataclass(frozen=True)
class Range:
    """Numbers to draw from, uniformly or (`log`) uniformly in their logarithm. `whole`: the setting takes integers."""

    low: float
    high: float
    log: bool
    whole: bool

    def draw(self, source: random.Random) -> float:
        """A random number from the range; fractions are rounded to three significant digits."""
        if self.log:
            value = math.exp(source.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = source.uniform(self.low, self.high)
        rounded = round(value) if self.whole else float(f"{value:.{_DIGITS}g}")
        return min(max(rounded, self.low), self.high)


Axis = Sequence[Any] | Range


def swept() -> list[str]:
    """The settings of train that may vary in a sweep."""
    return [name for name, field in base.fields(TrainConfig) if _why_not(name, field.metadata) is None]


def variants(config: TrainConfig, grid: Sequence[str], samples: int = 0) -> list[Variant]:
    """All combinations of the values in `grid` (entries NAME=VALUE,VALUE), or `samples` different random draws from
    them.

    Raises ValueError with every problem: an unknown setting or one that may not vary, a value of the wrong type,
    settings that do not go together, two equal variants.
    """
    axes = _axes(grid)
    ranges = [name for name, axis in axes.items() if isinstance(axis, Range)]
    if ranges and not samples:
        raise ValueError(f"grid: {', '.join(ranges)} has a range: say how many variants to draw (samples)")
    size = math.prod(len(axis) for axis in axes.values() if not isinstance(axis, Range))
    if not samples and size > _MOST:
        raise ValueError(f"grid: {size:,} variants are more than {_MOST}: draw some of them (samples)")
    if samples and not ranges and samples > size:
        raise ValueError(f"samples = {samples}, and the grid has {size} variants: leave samples out")
    points = _sampled(axes, samples, config.seed) if samples else _product(axes)
    found, problems = _validated(config, list(points) if axes else [])
    problems += _conflicts(config, found)
    if problems:
        raise ValueError("; ".join([*problems[:_MOST_PROBLEMS], *(["..."] if problems[_MOST_PROBLEMS:] else [])]))
    return found


def _axes(grid: Sequence[str]) -> dict[str, Axis]:
    """The values of each setting, not yet converted to the type of the setting."""
    axes: dict[str, Axis] = {}
    problems: list[str] = []
    for entry in grid:
        name, _, text = entry.partition("=")
        name = name.strip().replace("-", "_")
        try:
            if name in axes:
                raise ValueError(f"{name} is there twice: give all of its values at once")
            axes[name] = _axis(name, text.strip())
        except ValueError as error:
            problems.append(f"grid: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return axes


def _axis(name: str, text: str) -> Axis:
    field = TrainConfig.model_fields.get(name)
    if field is None:
        raise ValueError(f"unknown setting '{name}'{base.suggestion(name, swept())}")
    if why := _why_not(name, field.metadata):
        raise ValueError(f"{name} cannot vary: {why}{base.suggestion(name, swept())}")
    if not text:
        raise ValueError(f"{name} has no values: write {name}=VALUE,VALUE")
    if match := _RANGE.fullmatch(text):
        return _range(name, match, field.annotation)
    several = get_origin(field.annotation) is tuple
    if text.startswith("["):
        try:
            return list(json.loads(text))
        except ValueError as error:
            raise ValueError(f"{name}: {text} is no JSON list ({error})") from error
    values = [value.strip() for value in text.split(",")]
    return [value.split("+") for value in values] if several else values


def _range(name: str, match: "re.Match[str]", annotation: Any) -> Range:
    if annotation not in (int, float):
        raise ValueError(f"{name} is no number: list its values")
    try:
        low, high = float(match["low"]), float(match["high"])
    except ValueError:
        raise ValueError(f"{name}: {match[0]} is no range of numbers, such as 1e-6..1e-4:log") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{name}: {match[0]} is empty, the first number must be the smaller one")
    if match["log"] and low <= 0:
        raise ValueError(f"{name}: {match[0]} begins at {low:g}, and only numbers above 0 have a logarithm")
    return Range(low, high, bool(match["log"]), annotation is int)


def _why_not(name: str, marks: Sequence[Any]) -> str | None:
    """Why a setting may not vary in a sweep; None where it may."""
    if name in _NOT_OF_A_VARIANT:
        return _NOT_OF_A_VARIANT[name]
    if base.RUNTIME in marks:
        return "it changes no result"
    if base.PATH in marks or name in _ROWS:
        return "variants share their model, their rows and the reference of these"
    return None


def _product(axes: Mapping[str, Axis]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*(axis for axis in axes.values() if not isinstance(axis, Range))):
        yield dict(zip(axes, values, strict=True))


def _sampled(axes: Mapping[str, Axis], count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Different random points of the grid. With a larger `count` the first ones stay the same. Raises ValueError where
    the ranges hold too few different points."""
    seen = set[str]()
    for number in range(100 * count):
        source = random.Random(f"sweep/{seed}/{number}")
        point = {n: a.draw(source) if isinstance(a, Range) else source.choice(a) for n, a in axes.items()}
        if (key := json.dumps(point, default=str)) not in seen:
            seen.add(key)
            yield point
        if len(seen) == count:
            return
    raise ValueError(f"samples = {count}, but the grid gave only {len(seen)} different variants")


def _validated(config: TrainConfig, points: Sequence[Mapping[str, Any]]) -> tuple[list[Variant], list[str]]:
    """The variants that TrainConfig accepts, and the problems of the others."""
    own = {name: getattr(config, name) for name in TrainConfig.model_fields}
    found: list[Variant] = []
    problems: dict[str, None] = {}
    for point in points:
        try:
            variant = TrainConfig.model_validate({**own, **point})
        except ValidationError as error:
            problems |= dict.fromkeys(f"grid: {line}" for line in base.explain(TrainConfig, error))
            continue
        changes = {name: value for name, value in base.dump(variant).items() if name in point}
        found.append(Variant(_name(changes), changes, variant))
    return found, list(problems)


def _conflicts(config: TrainConfig, found: Sequence[Variant]) -> list[str]:
    problems: list[str] = []
    kinds = {variant.config.objective.kind: variant.config.loss_type[0] for variant in found}
    if len(kinds) > 1:
        texts = [f"{loss} trains on {kind}" for kind, loss in kinds.items()]
        problems.append(f"grid: variants share their rows, but {' and '.join(texts)}")
    if len({variant.config.objective.needs("z0") for variant in found}) > 1:
        problems.append("grid: variants share their rows, and only some of these losses need mismatched ones (KTO)")
    if any("seed" in variant.changes for variant in found):
        if config.eval_split:
            problems.append("grid: seed draws the rows of eval_split: name the held-out rows (eval_pairs) to vary it")
        if found[0].config.objective.needs("z0"):
            problems.append("grid: seed draws the mismatched rows of KTO, which variants share: it cannot vary")
    same: dict[str, str] = {}
    for variant in found:
        key = content_id(json.loads(json.dumps(base.result_fields(variant.config.resolved))))
        if key in same:
            problems.append(f"grid: {same[key]} and {variant.name} are the same")
        same[key] = variant.name
    return problems


def _name(changes: Mapping[str, Any]) -> str:
    """The folder of a variant: its changed settings and their values, or where these do not fit into a name a part of
    them with a digest."""
    words: list[str] = []
    whole = True
    for name, value in changes.items():
        text = "+".join(map(_text, value)) if isinstance(value, list) else _text(value)
        safe = _UNSAFE.sub("-", text).strip("-")
        whole = whole and safe == text.replace("+", "-")
        words.append(f"{name}-{safe}")
    joined = "__".join(words)
    if whole and len(joined) <= _LONGEST_NAME:
        return joined
    return f"{joined[:_LONGEST_NAME]}-{content_id(dict(changes))[:8]}"


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)
