"""One run of two rounds for all tests that only read it."""

from pathlib import Path

import pytest

from prefpipe.stages.report.subject import Subject, read
from tests.stages.report import cases

ALERTS = (
    {"rule": "A1", "level": "NOTICE", "step": 14, "message": "D of chosen falls", "advice": "watch A2"},
    {"rule": "A6", "level": "WARN", "step": 33, "message": "accuracy 0.995", "advice": "train fewer epochs"},
)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds, complete, with two alerts in each."""
    return cases.iterate_run(tmp_path_factory.mktemp("report") / "run", cases.Shape(alerts=ALERTS))


@pytest.fixture(scope="session")
def subject(finished: Path) -> Subject:
    """The same, read."""
    return read(finished)
