"""What a run reads of its settings against what the config refuses: no setting is taken that changes nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from prefpipe.config.build_pairs import READS, RULES, BuildPairsConfig, unread
from prefpipe.runs import store
from prefpipe.runs.store import Run
from prefpipe.stages import build_pairs
from tests.stages.build_pairs.runs import REWARD, Row, run_of

ROWS = [Row(p, f"{p}{n}", float(n - 2), f"text {p} {n}", num_tokens=3 + n) for p in "pq" for n in range(6)]
# seed is open to all, so that one value can be given to every command; contamination has a check of its own, and strict
# is read once the run is complete.
OPEN = {"seed", "contamination_ngram", "strict"}
CHOICES: list[dict[str, Any]] = [
    *({"rule": rule} for rule in RULES),
    {"rule": "best-worst", "format": "trl"},
    *({"output": "labels", "label_rule": rule} for rule in READS["label_rule"]),
    {"output": "labels", "format": "trl"},
    {"output": "groups", "format": "prefpipe"},  # the only one: others are refused
]


class Watched(BuildPairsConfig):
    """Settings that note which of them are read between `open_run` and the manifest."""

    def __getattribute__(self, name: str) -> Any:
        if name in BuildPairsConfig.model_fields:
            SEEN.add(name)
        return super().__getattribute__(name)


SEEN: set[str] = set()


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_setting_that_is_taken_is_read(
    choice: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_run = store.open_run

    @contextmanager
    def opened(*given: Any, **named: Any) -> Iterator[Run]:
        with open_run(*given, **named) as run:
            SEEN.clear()  # the fingerprint has read every one of them
            yield run

    monkeypatch.setattr(store, "open_run", opened)
    config = Watched(completions=(str(run_of(tmp_path / "g", ROWS)),), reward=REWARD, **choice)
    build_pairs.run(config, tmp_path / "o", force=False)
    seen = SEEN.copy()
    refused = set(unread({**dict(BuildPairsConfig()), **choice}))
    assert BuildPairsConfig.model_fields.keys() - seen - refused - OPEN - choice.keys() == set()
