"""The only reader of the clock: durations, the time of day, and the date that a chat template prints."""

import time
from datetime import UTC, datetime


def monotonic() -> float:
    """Seconds since some fixed point; differences are durations."""
    return time.monotonic()


def utc_now() -> str:
    """The time of day in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def age(timestamp: float) -> float:
    """Seconds since a moment that is given in seconds since the epoch, such as the time of a file."""
    return time.time() - timestamp


def local_time(form: str, day: str = "today") -> str:
    """The local time in a strftime format: now, or midnight of a day (YYYY-MM-DD). Chat templates print dates by it."""
    when = datetime.now() if day == "today" else datetime.fromisoformat(day)
    return when.astimezone().strftime(form)
