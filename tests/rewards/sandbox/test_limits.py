"""Where strict isolation is possible."""

import sys

import pytest

from prefpipe.rewards import sandbox
from prefpipe.rewards.sandbox import limits


def test_support_is_said_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.platform, "system", lambda: "Darwin")
    assert "Darwin" in (sandbox.supported() or "")
    monkeypatch.undo()
    monkeypatch.setattr(limits, "_landlock_version", lambda: -1)
    assert (
        sandbox.supported() is None
        or "Landlock" in (sandbox.supported() or "")
        or "x86_64" in (sandbox.supported() or "")
    )
    if sys.platform == "linux":
        assert sandbox.supported() is not None
