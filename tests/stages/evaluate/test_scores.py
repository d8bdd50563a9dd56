"""Log-probs beside the answers: each shard is scored once, and a sequence that kills the engine is left out."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.engines.base import ScoreRequest
from prefpipe.engines.fake import FakeEngine
from prefpipe.errors import PrefpipeError
from prefpipe.inference.pool import Inline
from prefpipe.inference.task import engine_settings, read_task
from prefpipe.runs import store
from prefpipe.runs.store import Run
from prefpipe.schemas import RefLogps
from prefpipe.stages.evaluate import scores
from tests.conftest import Write
from tests.stages.evaluate.cases import config, prompts_file

SEQUENCES = [
    (0, [ScoreRequest("a", [1], [5, 6]), ScoreRequest("deadly", [1], [66])]),
    (3, [ScoreRequest("b", [1], [7])]),
]


class Deadly(FakeEngine):
    """Dies of token 66."""

    def score(self, sequences: Iterable[ScoreRequest], *, adapter: bool) -> Iterator[tuple[str, list[float]]]:
        for sequence in sequences:
            if 66 in sequence.token_ids:
                raise RuntimeError("boom")
            yield sequence.completion_id, [-1.0 - (not adapter)] * len(sequence.token_ids)


@pytest.fixture
def settings(tiny_model: Path, write: Write) -> EvaluateConfig:
    return config(tiny_model, prompts_file(write, 2))


def test_a_sequence_that_kills_the_engine_is_left_out(settings: EvaluateConfig, tmp_path: Path) -> None:
    task = read_task(settings, settings.reward)
    started: list[int] = []

    def start() -> Inline:
        started.append(1)
        return Inline(Deadly(engine_settings(task, settings, 64)))

    def fill(run: Run) -> None:
        missing = [(index, requests) for index, requests in SEQUENCES if not run.has_shard(["kl/x"], index)]
        scores.fill(run, "kl/x", missing, start, reference="weights:a", adapter=False)

    with store.open_run(tmp_path / "e", "evaluate", settings, {}, force=False) as run:
        for _ in range(2):  # once among others, once alone
            with pytest.raises(PrefpipeError, match="the engine died"):
                fill(run)
        fill(run)
        found = [row for i in run.parts("kl/x") for row in run.read_part("kl/x", RefLogps, i).to_pylist()]
        assert [(r["completion_id"], r["token_logps"], r["reference"]) for r in found] == [
            ("a", [-2.0, -2.0], "weights:a"), ("b", [-2.0], "weights:a"),
        ]  # fmt: skip
        assert run.parts("kl/x") == [0, 3]
        fill(run)
    assert len(started) == 3  # nothing is missing: no engine starts
