"""Durations, times of day, dates."""

from prefpipe import clock


def test_clocks() -> None:
    assert clock.monotonic() <= clock.monotonic()
    assert clock.utc_now().endswith("+00:00")
    assert len(clock.local_time("%Y-%m-%d")) == len("2026-01-01")
