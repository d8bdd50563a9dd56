"""Tasks of `reasoning-gym`: prompts from a seed, and a reward from the checker of the task."""

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import reasoning_gym as gym_package
from reasoning_gym.composite import DatasetSpec
from reasoning_gym.factory import DATASETS

from prefpipe.config.base import suggestion
from prefpipe.config.rewards import ReasoningGym
from prefpipe.errors import UsageError
from prefpipe.ids import canonical_json
from prefpipe.rewards.base import Answer, RewardFunction, Scored
from prefpipe.rewards.isolation import Outcome, isolated
from prefpipe.runs import fsio

VERSION = 1  # raise it when the reward can change: a run never mixes two versions
_ASK = "\n\nGive the final answer alone between <answer> and </answer>."
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_SHOWN = 100


def inputs(_settings: ReasoningGym) -> dict[str, str]:
    """The version of the tasks and checkers."""
    return {"reasoning_gym": version("reasoning-gym")}


def prompts(
    task: str, size: int, seed: int, heldout: float = 0.0, datasets: Sequence[Mapping[str, Any]] = ()
) -> Iterator[dict[str, Any]]:
    """`size` prompts of a task, as rows of a prompts file; the last `heldout` share has split "heldout".

    The task `composite` draws each prompt from one of `datasets`: `name` of a task, `weight` (1) and `config` (settings
    of the task, {}), as in reasoning-gym. The same arguments and version give the same rows. The column `reasoning_gym`
    says which task made a row, with which settings; it travels in `meta`, and the reward of that name reads it there.
    Raises UsageError for a task that does not exist, or that refuses its settings.
    """
    dataset = _composite(size, seed, datasets) if task == "composite" else _single(task, size, seed, datasets)
    for index in range(size):
        entry = dataset[index]
        yield {
            "messages": [{"role": "user", "content": entry["question"] + _ASK}],
            "answer": None if entry["answer"] is None else str(entry["answer"]),
            "split": "heldout" if index >= size * (1 - heldout) else "train",
            "source": f"reasoning-gym {version('reasoning-gym')}",
            "reasoning_gym": _origin(task, dataset, entry, index, datasets),
        }


def write_prompts(
    path: Path, task: str, *, size: int, seed: int = 0, heldout: float = 0.0, datasets: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write `prompts` as JSONL."""
    rows = prompts(task, size, seed, heldout, datasets)
    fsio.write_text(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def reasoning_gym(settings: ReasoningGym) -> RewardFunction:
    """The score of the task's checker, 0 to 1: for most tasks 1, or a little for a wrong answer in the right form.

    The answer is the text in the last <answer>...</answer>, or the whole completion. Status ok for 1, wrong below.
    unparsable (no reward): `prompts` did not make the prompt. timeout, crash (no reward): the checker hung or failed.
    Some checkers evaluate expressions from the completion. They run in a forked process with limited time and memory,
    which is no sandbox.
    """
    check_all = isolated(
        f"{__name__}:check", timeout_seconds=settings.timeout_seconds, num_workers=settings.num_workers
    )

    def rate(answers: Sequence[Answer]) -> list[Scored]:
        places = [_place(a.meta) for a in answers]
        known = [(p, a) for p, a in zip(places, answers, strict=True) if p is not None]
        outcomes = iter(check_all([[p, a.messages[-1]["content"], a.text] for p, a in known]))
        missing = Scored(None, "unparsable", "the prompt was not made by prefpipe.rewards.gym")
        return [missing if p is None else _scored(next(outcomes)) for p in places]

    return rate


def check(place: dict[str, Any], question: str, text: str) -> tuple[float, str]:
    """(score, the answer that was rated). Raises ValueError when this reasoning-gym makes another question there."""
    dataset = _dataset(place["task"], place["size"], place["seed"], canonical_json(place.get("config", {})))
    entry = dataset[place["index"]]
    if not question.startswith(entry["question"]):
        raise ValueError(f"the prompt was made by another version than reasoning-gym {version('reasoning-gym')}")
    tagged = _TAGGED.findall(text)
    answer = (tagged[-1] if tagged else text).strip()
    return float(dataset.score_answer(answer, entry)), answer


@functools.lru_cache(maxsize=64)
def _dataset(task: str, size: int, seed: int, config: str = "{}") -> Any:
    return gym_package.create_dataset(task, **{"size": size, "seed": seed, **json.loads(config)})


def _single(task: str, size: int, seed: int, datasets: Sequence[Mapping[str, Any]]) -> Any:
    _check_task(task)
    if datasets:
        raise UsageError(f"datasets are given, but task '{task}' is no mixture", "make it the task 'composite'")
    return _dataset(task, size, seed)


def _composite(size: int, seed: int, datasets: Sequence[Mapping[str, Any]]) -> Any:
    if not datasets:
        raise UsageError(
            "the task 'composite' mixes other tasks and does not know which",
            "give datasets=[{'name': 'chain_sum', 'weight': 2}, {'name': 'mini_sudoku', 'weight': 1}]",
        )
    for part in datasets:
        _check_task(part.get("name", ""))
        if not {*part} <= {"name", "weight", "config"} or part["name"] == "composite":
            raise UsageError(
                f"{dict(part)} is no task of a mixture",
                "give `name` (of a task that is no mixture), `weight`, `config`",
            )
    specs = [DatasetSpec(d["name"], d.get("weight", 1), dict(d.get("config", {}))) for d in datasets]
    try:
        return gym_package.create_dataset("composite", size=size, seed=seed, datasets=specs)
    except (AssertionError, TypeError, ValueError) as error:
        raise UsageError(
            f"reasoning-gym refuses this mixture: {error}", "correct the names, weights or config"
        ) from error


def _check_task(task: str) -> None:
    if task not in DATASETS:
        raise UsageError(
            f"reasoning-gym has no task '{task}'{suggestion(task, list(DATASETS))}",
            f"tasks are {', '.join(sorted(DATASETS))}",
        )


def _origin(
    task: str, dataset: Any, entry: dict[str, Any], index: int, datasets: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The task that made an entry, with the arguments that make it again. An entry of a mixture has the same index in
    the dataset of its task; that dataset has another size and seed than the mixture."""
    if task != "composite":
        return {"task": task, "size": dataset.size, "seed": dataset.seed, "index": index}
    name = entry["metadata"]["source_dataset"]
    part = dataset.datasets[name]
    config = next(dict(d.get("config", {})) for d in datasets if d["name"] == name)
    return {
        "task": name,
        "size": part.size,
        "seed": part.seed,
        "index": index,
        **({"config": config} if config else {}),
    }


def _place(meta: str) -> dict[str, Any] | None:
    """The column `reasoning_gym` of a prompt; None for a prompt without it."""
    try:
        place = json.loads(meta or "{}").get("reasoning_gym")
    except (ValueError, AttributeError):
        return None
    return place if isinstance(place, dict) and {"task", "size", "seed", "index"} <= set(place) else None


def _scored(outcome: Outcome) -> Scored:
    if outcome.status != "ok":
        return Scored(None, outcome.status, outcome.detail)
    score, answer = outcome.value
    return Scored(score) if score >= 1 else Scored(score, "wrong", f"found {answer[:_SHOWN]!r}")
