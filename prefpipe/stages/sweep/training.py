"""Training of variants one after the other in this process. Rows, base model, audit and probe are shared by all.

Each variant is a run of `train` in a folder of its own. A complete run stays as it is, an interrupted one resumes.
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
_OF_EVERY_VARIANT = (StorageError, MissingInputError, IdentityError)  # errors that the next variant would meet as well


@dataclass
class WorkDone:
    """Counts of the work of a process: base models loaded, caches audited, memory probes, passes for reference
    log-probs. Names of variants that failed, each with the message."""

    loads: int = 0
    audits: int = 0
    probes: int = 0
    reference_passes: int = 0
    failed: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, other: "WorkDone") -> None:
        """Add the work of another process, or of another rung."""
        self.loads += other.loads
        self.audits += other.audits
        self.probes += other.probes
        self.reference_passes += other.reference_passes
        self.failed |= other.failed


def train(
    variants: Sequence[Variant], out: Path, data: TrainingData, until: Mapping[str, int], *, skip_locked: bool = False
) -> WorkDone:
    """Train every variant to its end, or to its step in `until`. Variants that another process holds are an error, or
    left out with `skip_locked`. The failure of a single variant is recorded; an error that every variant would meet is
    raised."""
    shared, done = Shared(data), WorkDone()
    _reuse_reference_logps(shared, variants, out)
    ordered = sorted(variants, key=lambda variant: variant.config.tuning == "full")  # last: it drops the shared base
    for number, variant in enumerate(ordered, 1):
        place, last = out / FOLDER / variant.name, until.get(variant.name, 0)
        if has_reached(place, last):
            continue
        log.info(f"variant {number}/{len(ordered)}: {variant.name}")
        try:
            stage.run(variant.config, place, force=False, shared=shared, until=last)
        except Paused:
            log.info(f"{variant.name} pauses after {last} steps")
        except _OF_EVERY_VARIANT:
            raise
        except LockedError:
            if not skip_locked:
                raise
        except PrefpipeError as error:
            log.warn(f"{variant.name} failed: {error.message}")
            done.failed[variant.name] = error.message
    done.loads, done.probes = shared.loads, shared.probes
    done.reference_passes, done.audits = shared.reference.passes, shared.reference.audits
    return done


def has_reached(place: Path, step: int) -> bool:
    """Whether an incomplete run has a checkpoint at this step or later; False for step 0."""
    steps = [int(path.name.removeprefix("step-")) for path in (place / "checkpoints").glob("step-*[0-9]")]
    return 0 < step <= max(steps, default=0) and not (place / "manifest.json").exists()


def _reuse_reference_logps(shared: Shared, variants: Sequence[Variant], out: Path) -> None:
    """Take the reference log-probs that a complete variant computed for the variants that follow."""
    for variant in variants:
        place = out / FOLDER / variant.name
        if not (place / "manifest.json").exists():
            continue
        try:
            shared.reference.missing = store.read_dataset(place, "ref_logps", RefLogps)
        except PrefpipeError:  # none were computed, or the file is damaged, which the run itself reports
            continue
        return
