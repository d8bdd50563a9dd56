"""Trackers that get the metrics beside metrics.jsonl: TensorBoard, W&B, Trackio, MLflow, through accelerate's classes.

Nothing is uploaded unless the environment variables of a tracker ask for it. TensorBoard and MLflow write into the run
directory (MLFLOW_TRACKING_URI names a server), W&B runs offline there (WANDB_MODE=online uploads), Trackio writes to
its local cache (TRACKIO_SPACE_ID uploads). Only rank 0 imports the packages, and only those that the settings name.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from prefpipe.errors import MissingInputError

_PROJECT = "prefpipe"
Track = Callable[[int, Mapping[str, float]], None]


class Tracker(Protocol):
    """The part of accelerate's GeneralTracker that is used here."""

    def start(self) -> None:
        """Open the tracker."""
        ...

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record the settings."""
        ...

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        """Record the metrics of a step."""
        ...

    def finish(self) -> None:
        """Flush and close the tracker."""
        ...


def check_installed(names: Sequence[str]) -> None:
    """Raise MissingInputError for a tracker whose package is not installed: before a model is loaded, not after."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingInputError(
                f"--report-to {name}: the package {name} is not installed",
                f"install it: pip install {'mlflow-skinny' if name == 'mlflow' else name}",
            )


@contextmanager
def tracking(names: Sequence[str], out: Path, run_id: str, settings: Mapping[str, Any], first: int) -> Generator[Track]:
    """Yields a function that sends the metrics of a step to all trackers; they are closed after an error too.

    `run_id` is the same whenever this run is resumed. Steps that an interrupted process sent after its last checkpoint
    are sent again, with the same values: TensorBoard drops the old ones, the others keep both.
    """
    with ExitStack() as stack:
        plain = _plain(settings)
        trackers = [make(name, out, run_id, first, plain) for name in names]
        for tracker, needs_settings in trackers:
            with redirect_stdout(sys.stderr):  # some print a greeting; stdout is for data
                tracker.start()
            stack.callback(_finish, tracker)
            if needs_settings:
                tracker.store_init_configuration(plain)

        def track(step: int, values: Mapping[str, float]) -> None:
            for name, (tracker, _) in zip(names, trackers, strict=True):
                tracker.log(_flat(values) if name == "mlflow" else dict(values), step=step)

        yield track


def _finish(tracker: Tracker) -> None:
    with redirect_stdout(sys.stderr):
        tracker.finish()


def make(name: str, out: Path, run_id: str, first: int, settings: Mapping[str, Any]) -> tuple[Tracker, bool]:
    """One of accelerate's trackers, set up to write locally and to resume the run of this id; and whether it needs the
    settings after its start.

    W&B and Trackio lose the settings of a run that is resumed, so they get them before. MLflow keeps those of the first
    start and refuses others, with which a run may be resumed: a smaller token budget, for example.
    """
    from accelerate import PartialState  # noqa: PLC0415  (only a run that tracks pays for it)
    from accelerate import tracking as accelerated  # noqa: PLC0415

    PartialState()  # the trackers log through it; it joins the process group, if there is one
    shown = f"{out.resolve().name}-{run_id[:8]}"
    resuming: dict[str, Any] = {"name": shown, "resume": "allow", "config": dict(settings)}
    if name == "tensorboard":
        return accelerated.TensorBoardTracker("tensorboard", logging_dir=out, purge_step=first or None), first == 0
    if name == "wandb":
        mode = os.environ.get("WANDB_MODE", "offline")
        project = os.environ.get("WANDB_PROJECT", _PROJECT)
        return accelerated.WandBTracker(project, dir=str(out), id=run_id, mode=mode, **resuming), False
    if name == "trackio":
        project = os.environ.get("TRACKIO_PROJECT", _PROJECT)
        return accelerated.TrackioTracker(project, embed=False, **resuming), False
    known = _mlflow_run(out, shown)
    return accelerated.MLflowTracker(_PROJECT, run_id=known, run_name=shown), known is None


def _mlflow_run(out: Path, name: str) -> str | None:
    """The id of the MLflow run of this name, if there is one; without a server it is in the run directory."""
    import mlflow  # noqa: PLC0415  # pyright: ignore[reportMissingImports]  (an optional package)

    if "MLFLOW_TRACKING_URI" not in os.environ:
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # files need no SQL packages, which mlflow-skinny lacks
        mlflow.set_tracking_uri((out / "mlflow").resolve().as_uri())
    known = mlflow.search_experiments(filter_string=f"name = '{_PROJECT}'")
    if not known:
        return None
    ids = [experiment.experiment_id for experiment in known]
    runs = mlflow.search_runs(ids, f"attributes.run_name = '{name}'", output_format="list")
    return runs[0].info.run_id if runs else None


def _flat(values: Mapping[str, float]) -> dict[str, float]:
    """Metrics under names of at most three parts. A local MLflow keeps a metric in a file of its name, and the file
    train/rewards/chosen cannot be the folder of train/rewards/chosen/p05: that becomes train/rewards/chosen_p05."""
    parts = {name: name.split("/") for name in values}
    return {"/".join([*p[:2], "_".join(p[2:])] if p[2:] else p): values[name] for name, p in parts.items()}


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as scalars, which all trackers take; None and lists become text."""
    return {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in settings.items()}
