"""Rounds that are taken from another run: linked, never copied, and known by their digests. And whether the optimizer
of the round before is still there."""

from pathlib import Path

from prefpipe import reading
from prefpipe.config.base import result_fields
from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.iterate import IterateConfig
from prefpipe.errors import DataError, MissingInputError, UsageError
from prefpipe.ids import content_id
from prefpipe.inputs import files
from prefpipe.models import policy
from prefpipe.runs import checkpoints, commits, links, manifests, saved_config, store
from prefpipe.runs.store import Manifest
from prefpipe.stages.iterate.plan import trained

_HINT = "take fewer rounds (--from-round), or finish that run first"


def digests(config: IterateConfig) -> dict[str, str]:
    """The digest of every step of the rounds that are taken, by its name; empty without from_run.

    Raises MissingInputError for a round that is not complete, DataError for a damaged one, UsageError where it does not
    fit this run: another model, another kind of tuning, an evaluation with other settings.
    """
    if not config.from_run:
        return {}
    source = Path(config.from_run)
    saved = saved_config.read(source / "config.json", force=False)
    if saved is not None and saved["command"] != "iterate":
        raise manifests.other_kind(source, saved["command"], "iterate", "--from-run")
    found: dict[str, str] = {}
    for number in range(config.from_round + 1):
        folder = source / f"round-{number}"
        evaluates = number % config.evaluate_every == 0
        needed = (*(() if number == 0 else ("generate", "build-pairs", "train")), *(("evaluate",) if evaluates else ()))
        lacking = [step for step in needed if not (folder / step / "manifest.json").exists()]
        if lacking:
            raise MissingInputError(f"{folder} has no complete {', '.join(lacking)}", _HINT)
        for path in sorted(folder.glob("*/manifest.json")):
            manifest = store.read_manifest(path.parent)
            _check_whole(path.parent, manifest)
            found[f"{folder.name}/{path.parent.name}"] = manifest["digest"]
    _check_fits(config, source)
    return found


def link(config: IterateConfig, out: Path) -> None:
    """Let OUT/round-N be that of the other run, for every round that is taken."""
    for number in range(config.from_round + 1) if config.from_run else ():
        links.publish(out / f"round-{number}", Path(config.from_run) / f"round-{number}")


def check_optimizer(config: IterateConfig, out: Path, number: int) -> None:
    """Raise DataError, before the first step of a round, where it is to go on with an optimizer whose checkpoint is
    gone, and as `checkpoints.source`. Training that has begun needs that checkpoint no more."""
    here, before = (out / f"round-{n}" / "train" for n in (number, number - 1))
    begun = (here / "manifest.json").exists() or any(here.glob("checkpoints/step-*"))
    if config.optimizer == "continue" and number > 1 and not begun:
        checkpoints.check_there(checkpoints.source(before, config.train.optim))


def identity(found: dict[str, str]) -> dict[str, str]:
    """The rounds that are taken, as an input of this run."""
    return {"from_run": content_id(found)} if found else {}


def _check_whole(step: Path, manifest: Manifest) -> None:
    """Raise DataError for a step with a damaged file: a branch can neither make it again nor move it away."""
    for name, file in manifest["files"].items():
        if not commits.matches(step / name, file["blake3"]):
            raise DataError(
                f"{step / name} is damaged or missing, and this run takes it from there",
                "run the command that made it again: it makes the file again",
            )


def _check_fits(config: IterateConfig, source: Path) -> None:
    start = source / "round-0" / "evaluate"
    manifest = store.read_manifest(start)
    here = policy.resolve(config.model).id
    if manifest["identity"]["policy"] != here:
        raise UsageError(
            f"{source} started from {manifest['identity']['policy']}, and model = {config.model} is {here}",
            "give the model of that run",
        )
    last = trained(config, source, config.from_round)
    if not Path(last.model if config.train.tuning == "full" else last.adapter).exists() and config.from_round:
        raise UsageError(
            f"{source}/round-{config.from_round} was trained with another tuning than {config.train.tuning}",
            "give the tuning of that run in [train]",
        )
    then = EvaluateConfig.model_validate(reading.read_json(start / "config.json")["config"])
    same = {"round": 0}
    before, now = result_fields(then) | same, result_fields(config.evaluate) | same
    differing = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if manifest["inputs"]["prompts"] != files.digest(config.evaluate.prompts):
        differing.append("prompts")
    if differing:
        raise UsageError(
            f"the evaluations of {source} have other settings than [evaluate]: {', '.join(differing)}",
            "rounds are compared by one evaluation: give the [evaluate] table of that run",
        )
