"""Train variants one after the other in this process: rows, base model, audit and probe are those of the first.

Each is a run of `train` in a folder of its own: one that is complete stays as it is, one that was cut goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prefpipe import log
from prefpipe.config.grid import Variant
from prefpipe.errors import IdentityError, LockedError, MissingInputError, PrefpipeError, StorageError
from prefpipe.runs import store
from prefpipe.schemas import RefLogps
from prefpipe.stages.train import stage
from prefpipe.stages.train.inputs import TrainingData
from prefpipe.stages.train.session import Paused
from prefpipe.stages.train.sharing import Shared

FOLDER = "variants"
_OF_ALL = (StorageError, MissingInputError, IdentityError)  # errors that the next variant would meet as well


@dataclass
class Trained:
    """What a process did: how often it loaded a base model, audited the cache, probed the memory and computed log-probs
    of a reference; and by the names of variants that failed, why."""

    loads: int = 0
    audits: int = 0
    probes: int = 0
    reference_passes: int = 0
    failed: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, other: "Trained") -> None:
        """Count what another process did, or this one on another rung."""
        self.loads += other.loads
        self.audits += other.audits
        self.probes += other.probes
        self.reference_passes += other.reference_passes
        self.failed |= other.failed


def train(
    variants: Sequence[Variant], out: Path, data: TrainingData, until: Mapping[str, int], *, leave_busy: bool = False
) -> Trained:
    """Train every variant to its end, or to its step in `until`; with `leave_busy` but for those that another process
    holds. A variant that fails by itself is noted; an error that concerns all is raised."""
    shared, done = Shared(data), Trained()
    _take_values(shared, variants, out)
    ordered = sorted(variants, key=lambda variant: variant.config.tuning == "full")  # the base is shared before that
    for number, variant in enumerate(ordered, 1):
        place, last = out / FOLDER / variant.name, until.get(variant.name, 0)
        if has_come_to(place, last):
            continue
        log.info(f"variant {number}/{len(ordered)}: {variant.name}")
        try:
            stage.run(variant.config, place, force=False, shared=shared, until=last)
        except Paused:
            log.info(f"{variant.name} pauses after {last} steps")
        except _OF_ALL:
            raise
        except LockedError:
            if not leave_busy:
                raise
        except PrefpipeError as error:
            log.warn(f"{variant.name} failed: {error.message}")
            done.failed[variant.name] = error.message
    done.loads, done.probes = shared.loads, shared.probes
    done.reference_passes, done.audits = shared.reference.passes, shared.reference.audits
    return done


def has_come_to(place: Path, step: int) -> bool:
    """Whether a run that is not complete has a checkpoint at this step or behind it; never at step 0."""
    steps = [int(path.name.removeprefix("step-")) for path in (place / "checkpoints").glob("step-*[0-9]")]
    return 0 < step <= max(steps, default=0) and not (place / "manifest.json").exists()


def _take_values(shared: Shared, variants: Sequence[Variant], out: Path) -> None:
    """The reference log-probs that a complete variant computed, for those that are still to come."""
    for variant in variants:
        place = out / FOLDER / variant.name
        if not (place / "manifest.json").exists():
            continue
        try:
            shared.reference.missing = store.read_dataset(place, "ref_logps", RefLogps)
        except PrefpipeError:  # it has none, or is damaged: the run itself says so
            continue
        return
