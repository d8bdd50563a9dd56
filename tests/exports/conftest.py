"""A run of pairs to take out, and a hub to take it to."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from tests import serving
from tests.exports.stand_in import TOKEN, Hub, hub
from tests.stages.build_pairs.runs import Row, build, run_of


@pytest.fixture(scope="session")
def paired(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `build-pairs` with two pairs."""
    root = tmp_path_factory.mktemp("paired")
    rows = [Row(p, f"{p}{n}", float(n), f"answer {n} to {p}") for p in ("a", "b") for n in range(2)]
    build(root / "p", run_of(root / "g", rows))
    return root / "p"


@pytest.fixture
def standing_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub of this process talks to, with a token for it."""
    with hub() as running:
        for name, value in (("ENDPOINT", running.url), ("HF_HUB_DISABLE_XET", True), ("HF_HUB_OFFLINE", False)):
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address on localhost where nobody listens."""
    with serving.nobody() as port:
        yield f"http://127.0.0.1:{port}"
