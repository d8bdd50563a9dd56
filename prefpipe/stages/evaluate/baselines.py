"""An earlier evaluation to compare with: what must be equal for a comparison to mean something, and its answers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefpipe import log
from prefpipe.errors import UsageError
from prefpipe.ids import content_id
from prefpipe.rewards.base import RewardOn
from prefpipe.runs import manifests, saved_config, store
from prefpipe.runs.store import Manifest
from prefpipe.schemas import Evaluation
from prefpipe.stages.evaluate.answers import DATASET

# Settings of a run that may differ: whose answers, to which prompts, and how many.
_OF_NO_MATTER = {
    *("command", "schema", "round", "seed", "split", "limit", "part", "num_samples", "reward", "pass_reward"),
    *("input:policy", "input:prompts"),
}
Key = tuple[str, int]  # prompt_id, sample_index


@dataclass(frozen=True, slots=True)
class Other:
    """An answer of a baseline: its reward, and its length in characters."""

    reward: float | None
    characters: int


@dataclass(frozen=True)
class Baseline:
    """A complete run of evaluate. `directory` is what the user wrote."""

    directory: str
    manifest: Manifest

    @property
    def path(self) -> Path:
        """Its run directory."""
        return Path(self.directory)

    @property
    def id(self) -> str:
        """Its digest, which names it in totals: where it lies is no part of a result."""
        return self.manifest["digest"]

    @property
    def policy(self) -> str:
        """The id of its policy."""
        return self.manifest["identity"]["policy"]

    @property
    def answers_id(self) -> str:
        """What stands for its answers, whatever was computed beside them."""
        return content_id([self.manifest["files"][name]["blake3"] for name in self._names(DATASET)])

    def has(self, dataset: str) -> bool:
        """Whether the run has a dataset."""
        return any(name.startswith(f"{dataset}/") for name in self.manifest["files"])

    def parts(self, dataset: str, row_type: type, columns: list[str]) -> Iterator[list[dict[str, Any]]]:
        """Some columns of a dataset, part by part; every file is checked against its digest."""
        for name in self._names(dataset):
            yield store.read_file(self.path, self.manifest, name, row_type, columns).to_pylist()

    def answers(self, dataset: str = DATASET) -> dict[Key, Other]:
        """Its answers as numbers."""
        columns = ["prompt_id", "sample_index", "reward", "text"]
        return {
            (row["prompt_id"], row["sample_index"]): Other(row["reward"], len(row["text"]))
            for rows in self.parts(dataset, Evaluation, columns)
            for row in rows
        }

    def prompt_ids(self) -> set[str]:
        """The prompts that it has answers to."""
        return {row["prompt_id"] for rows in self.parts(DATASET, Evaluation, ["prompt_id"]) for row in rows}

    def texts(self, reward_on: RewardOn, *, greedy: bool) -> dict[Key, str]:
        """Its greedy or its sampled answers as rewards see them."""
        columns = ["prompt_id", "sample_index", "text", "thinking"]
        return {
            (row["prompt_id"], row["sample_index"]): (row["thinking"] or "") * (reward_on == "all") + row["text"]
            for rows in self.parts(DATASET, Evaluation, columns)
            for row in rows
            if (row["sample_index"] == 0) == greedy
        }

    def _names(self, dataset: str) -> list[str]:
        return store.part_names(self.path, self.manifest, dataset)


def read(directory: str, deciding: str, identity: str) -> Baseline:
    """A baseline by its directory; `deciding` is the reward that decides in this run, `identity` what identifies it.

    Raises MissingInputError for a run that is not complete, UsageError for one of another command or whose answers pass
    by another reward.
    """
    manifest = store.read_manifest(Path(directory))
    if manifest["command"] != "evaluate":
        raise manifests.other_kind(Path(directory), manifest["command"], "evaluate", "--baseline")
    rewards = {name: value for name, value in manifest["inputs"].items() if name.startswith("reward ")}
    if identity not in rewards.values():
        theirs = ", ".join(f"{name.removeprefix('reward ')} ({value})" for name, value in rewards.items())
        raise UsageError(
            f"the answers of baseline {directory} pass by another reward: {theirs} there, {deciding} ({identity}) here",
            f"evaluate its policy again with --reward {deciding} and the same settings of it",
        )
    return Baseline(directory, manifest)


def check_apart(directories: Sequence[str], out: Path) -> None:
    """Raise UsageError for a baseline that is this run, or that is there twice: it says nothing about the policy."""
    places = [Path(directory).resolve() for directory in directories]
    for number, (directory, place) in enumerate(zip(directories, places, strict=True)):
        if place == out.resolve():
            raise UsageError(
                f"--baseline {directory} is this run itself (--out)", "give an earlier evaluation, or another --out"
            )
        if place in places[:number]:
            raise UsageError(f"--baseline {directory} is there twice", "give each evaluation once")


def differences(baseline: Baseline, out: Path) -> dict[str, list[Any]]:
    """Settings of sampling and rating that differ: name to [there, here], with a warning."""
    theirs, ours = (_identity(path) for path in (baseline.path, out))
    found = {
        name: [theirs.get(name), ours.get(name)]
        for name in sorted({*theirs, *ours} - _OF_NO_MATTER)
        if theirs.get(name) != ours.get(name) and not name.startswith("input:reward ")
    }
    if found:
        listed = ", ".join(f"{name} ({there!r} there, {here!r} here)" for name, (there, here) in found.items())
        log.warn(f"baseline {baseline.directory} was evaluated with other settings: {listed}")
    return found


def _identity(run: Path) -> Mapping[str, Any]:
    saved = saved_config.read(run / "config.json", force=False)
    return saved["identity"] if saved else {}
