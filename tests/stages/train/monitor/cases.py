"""What TensorBoard shows of a run."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(out: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) that TensorBoard shows for a metric: purged steps are gone."""
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]
