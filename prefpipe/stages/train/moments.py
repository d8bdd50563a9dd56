"""The optimizer of a run that is complete, for a run that goes on with it: its moments and step counts.

They stand in the checkpoint whose weights the run ended with. A run is known by its manifest, so that its checkpoints
are read by a run that starts, and by none that is complete or goes on.
"""

from dataclasses import dataclass
from pathlib import Path

from prefpipe import log, reading
from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError, IdentityError
from prefpipe.forward.tensor_files import Stored
from prefpipe.runs import manifests, saved_config, store
from prefpipe.runs.store import Manifest
from prefpipe.stages.train import checkpoint
from prefpipe.stages.train.checkpoint import Checkpoint
from prefpipe.stages.train.optimizer import MasterOptimizer
from prefpipe.stages.train.parallel import World

_AGAIN = "the same settings make it again: run its command with --force, or go on with a new optimizer"


@dataclass(frozen=True)
class Source:
    """A complete run of train: its directory, its manifest, and the step whose weights it ended with."""

    out: Path
    manifest: Manifest
    step: int


def source(config: TrainConfig) -> Source | None:
    """The run whose optimizer the settings ask for; None where they ask for a new one.

    Raises MissingInputError where it is not complete, UsageError where it is a run of something else, IdentityError
    for one with another kind of optimizer.
    """
    if config.optimizer_from == "none":
        return None
    out = Path(config.optimizer_from)
    manifest = store.read_manifest(out)
    if manifest["command"] != "train":
        raise manifests.other_kind(out, manifest["command"], "train", "--optimizer-from")
    saved = (saved_config.read(out / "config.json", force=False) or {"config": {}})["config"]
    theirs = saved.get("optim", TrainConfig.model_fields["optim"].default)
    if theirs != config.optim:
        raise IdentityError(
            f"{out} was trained with optim = {theirs}, whose state is not that of {config.optim}",
            f"give --optim {theirs}, or leave out optimizer_from",
        )
    totals = manifest["totals"]
    best = totals.get("best") if saved.get("load_best_model_at_end") else None
    return Source(out, manifest, best["step"] if best else totals["steps"])


def inputs(config: TrainConfig) -> dict[str, str]:
    """What identifies the optimizer that a run begins with, by content; empty for a new one. Raises as `source`."""
    found = source(config)
    return {"optimizer_from": found.manifest["digest"]} if found else {}


def take(config: TrainConfig, optimizer: MasterOptimizer, initial: str, world: World) -> None:
    """Let a new optimizer go on with the one that the settings ask for, if any; each rank reads its rows. `initial` is
    the id of the policy that is trained. A collective call.

    Raises as `source`, DataError where the checkpoint is damaged or gone, and IdentityError where it is of other
    tensors.
    """
    found = world.together(lambda: source(config))
    if found is None:
        return
    saved = _checkpoint(found, world)
    misfits = optimizer.misfits(saved.tensors)
    if misfits:
        raise IdentityError(
            f"the optimizer of {found.out} is of other tensors: {'; '.join(misfits)}",
            "train the same tensors as that run (tuning, lora_r, targets), or leave out optimizer_from",
        )
    world.together(lambda: optimizer.load_moments(saved.tensors))
    if not world.leads:
        return
    log.info(f"the optimizer goes on with that of {found.out} after its step {found.step}")
    if found.manifest["identity"]["policy"] != initial:
        log.warn(f"{found.out} ended with other weights than those that are trained, and its optimizer is of those")


def _checkpoint(found: Source, world: World) -> Checkpoint[Stored]:
    try:
        saved = checkpoint.at_step(found.out.absolute() / "checkpoints", found.step, world)
    except DataError as error:
        wrong = f"the optimizer of {found.out} is lost: its checkpoint {found.step} is damaged or missing"
        raise DataError(wrong, _AGAIN) from error
    own = world.together(lambda: reading.file_digest(found.out / "metrics.jsonl", saved.metrics_bytes))
    if saved.metrics_digest not in ("", own):  # one of an older version has none
        raise DataError(f"checkpoint {found.step} of {found.out} does not belong to its metrics.jsonl", _AGAIN)
    return saved
