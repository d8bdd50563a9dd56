"""A fixed text: cut into windows, scored once, compared window by window."""

from pathlib import Path

import pytest

from prefpipe.errors import DataError, MissingInputError
from prefpipe.runs import store
from prefpipe.schemas import RefLogps
from prefpipe.stages.evaluate import perplexity
from prefpipe.stages.evaluate.baselines import Baseline
from prefpipe.stages.evaluate.perplexity import windows
from tests.conftest import Write
from tests.stages.evaluate.cases import config, prompts_file, run


def test_windows_hold_every_token_once() -> None:
    found = windows(range(10), 4)
    assert [(w.prompt_token_ids, w.token_ids) for w in found] == [([0], [1, 2, 3]), ([4], [5, 6, 7]), ([8], [9])]
    assert windows(range(9), 4)[-1].token_ids == [5, 6, 7]  # the ninth token stands alone: nothing to score
    assert len({w.completion_id for w in windows([1, 2] * 8, 4)}) == 4
    assert windows([1], 4) == []


def test_the_text_is_scored_once_and_compared(
    tiny_model: Path, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nats per token are the mean over tokens of all windows; a policy like the baseline differs by nothing."""
    path, text = prompts_file(write, 2), tmp_path / "text.txt"
    text.write_text("The owl sees at night. " * 60)
    first = run(config(tiny_model, path, perplexity_text=str(text)), tmp_path / "a")
    found = first["totals"]["perplexity"]
    (folder,) = (tmp_path / "a" / "perplexity").iterdir()
    rows = store.read_dataset(tmp_path / "a", f"perplexity/{folder.name}", RefLogps).to_pylist()
    logps = [p for row in rows for p in row["token_logps"]]
    assert len(rows) == 3
    assert found["tokens"] == len(logps) == len(text.read_bytes()) - len(rows)
    assert found["per_token"] == pytest.approx(-sum(logps) / len(logps))
    assert found["low"] < found["per_token"] < found["high"]
    assert found["drops"] == []
    settings = config(tiny_model, path, seed=1, perplexity_text=str(text), baseline=(str(tmp_path / "a"),))
    (drop,) = run(settings, tmp_path / "b")["totals"]["perplexity"]["drops"]
    assert drop == {"baseline": first["digest"], "difference": 0.0, "low": 0.0, "high": 0.0, "failed": False}
    text.write_text("Another text that is short.")
    (tmp_path / "none").mkdir()
    assert run(settings, tmp_path / "b")["totals"]["perplexity"]["drops"] == []
    assert "has not scored" in capsys.readouterr().err


@pytest.mark.parametrize(("worse", "failed"), [(0.5, True), (0.0, False), (-0.5, False)])
def test_a_text_that_became_less_likely_has_failed(
    tiny_model: Path, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worse: float, failed: bool
) -> None:
    path, text = prompts_file(write, 2), tmp_path / "text.txt"
    text.write_text("The owl sees at night. " * 90)
    manifest = run(config(tiny_model, path, perplexity_text=str(text)), tmp_path / "a")
    baseline = Baseline(str(tmp_path / "a"), manifest)
    read = baseline.parts

    def better(self: Baseline, *arguments: object):  # type: ignore[no-untyped-def]
        for rows in read(*arguments):  # type: ignore[arg-type]
            yield [{**row, "ref_logps": row["ref_logps"] + worse * row["num_tokens"]} for row in rows]

    monkeypatch.setattr(Baseline, "parts", better)
    of = perplexity.read(str(text), 2048)
    run_dir = store.Run(tmp_path / "a", "evaluate", manifest["fingerprint"], {}, {}, "")
    ((drop),) = perplexity.totals(run_dir, of, [baseline])["drops"]
    assert drop["difference"] == pytest.approx(worse)
    assert drop["failed"] == failed


def test_a_text_must_be_there_and_hold_something(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    path = prompts_file(write, 2)
    with pytest.raises(MissingInputError):
        run(config(tiny_model, path, perplexity_text=str(tmp_path / "none.txt")), tmp_path / "e")
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(DataError, match="fewer than 2 tokens"):
        run(config(tiny_model, path, perplexity_text=str(tmp_path / "short.txt")), tmp_path / "e")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        run(config(tiny_model, path, perplexity_text=str(tmp_path / "bytes.txt")), tmp_path / "e")
