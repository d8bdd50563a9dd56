"""The optimizer of a run that is complete, for a run that goes on with it: its moments and step counts.

They stand in the checkpoint whose weights the run ended with. A run is known by its manifest, so that its checkpoints
are read by a run that starts, and by none that is complete or goes on.
"""

from pathlib import Path

from prefpipe import log, reading
from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError, IdentityError
from prefpipe.forward.tensor_files import Stored
from prefpipe.runs import checkpoints
from prefpipe.runs.checkpoints import Source
from prefpipe.stages.train import checkpoint
from prefpipe.stages.train.checkpoint import Checkpoint
from prefpipe.stages.train.optimizer import MasterOptimizer
from prefpipe.stages.train.parallel import World


def source(config: TrainConfig) -> Source | None:
    """The run whose optimizer the settings ask for; None for a new one. Raises as `checkpoints.source`."""
    return checkpoints.source(Path(config.optimizer_from), config.optim) if config.optimizer_from != "none" else None


def take(found: Source | None, optimizer: MasterOptimizer, initial: str, world: World) -> None:
    """Let a new optimizer go on with that of a run, if any; each rank reads its rows. `initial` is the id of the policy
    that is trained. A collective call.

    Raises DataError where the checkpoint is damaged or gone, IdentityError where it is of other tensors.
    """
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
        saved = checkpoint.at_step(found.checkpoint.parent, found.step, world)
    except DataError as error:
        raise found.lost() from error
    own = world.together(lambda: reading.file_digest(found.out / "metrics.jsonl", saved.metrics_bytes))
    if saved.metrics_digest not in ("", own):  # one of an older version has none
        raise DataError(
            f"checkpoint {found.step} of {found.out} does not belong to its metrics.jsonl", checkpoints.AGAIN
        )
    return saved
