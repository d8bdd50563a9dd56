"""The parity report: figures by hand, rows by hash, and a warning that can be raised."""

import math
import random
from pathlib import Path
from typing import NoReturn

import pytest

from prefpipe import engines
from prefpipe.engines.base import EngineSettings, ScoreRequest
from prefpipe.inference import parity
from prefpipe.inference.parity import CachedLogps
from prefpipe.models import policy
from prefpipe.models.chat import load_chat


def checked(name: str, *logps: float) -> CachedLogps:
    return CachedLogps(ScoreRequest(name, [1], list(range(len(logps)))), logps)


def test_figures_by_hand() -> None:
    """Deltas: a: +1, -1 -> sum 0; b: +2, +0 -> sum 2. Mean 0.5, mean absolute 1, sd of (1,-1,2,0) = sqrt(5/3)."""
    report = parity.compare(
        [checked("a", -2.0, -2.0), checked("b", -3.0, -1.0)], {"a": [-1.0, -3.0], "b": [-1.0, -1.0]}, "float32"
    )
    per_token, sums = report["per_token"], report["per_completion"]
    assert (per_token["count"], per_token["mean"], per_token["mean_absolute"], per_token["largest"]) == (
        4,
        0.5,
        1.0,
        2.0,
    )
    assert per_token["sd"] == pytest.approx(math.sqrt(5 / 3))
    assert (sums["count"], sums["mean"], sums["largest"]) == (2, 1.0, 2.0)
    assert sums["sd"] == pytest.approx(math.sqrt(2))
    assert report["margin_shift"] == pytest.approx(0.1 * math.sqrt(2) * math.sqrt(2))
    assert not report["agrees"]
    counted = {"0": 1, "<1e-5": 0, "<1e-4": 0, "<1e-3": 0, "<0.01": 0, "<0.1": 0, "<1": 0, ">=1": 3}
    assert report["histogram"] == counted


def test_tokens_are_counted_by_the_size_of_their_difference() -> None:
    fresh = {"a": [-1.0, -1.0 + 2e-6, -1.0 - 0.02, -1.5]}
    report = parity.compare([checked("a", -1.0, -1.0, -1.0, -1.0)], fresh, "float32")
    assert {name: n for name, n in report["histogram"].items() if n} == {"0": 1, "<1e-5": 1, "<0.1": 1, "<1": 1}


def test_what_the_shift_of_a_margin_means() -> None:
    """Simulated: independent errors of two completions move beta * (chosen - rejected) by the sd that is reported."""
    source = random.Random(0)
    rows = [checked(str(i), *[-1.0] * 8) for i in range(400)]
    fresh = {str(i): [-1.0 + source.gauss(0, 0.1) for _ in range(8)] for i in range(400)}
    report = parity.compare(rows, fresh, "bfloat16")
    sums = [sum(fresh[str(i)]) for i in range(400)]
    margins = [0.1 * (a - b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
    assert report["margin_shift"] == pytest.approx(math.sqrt(sum(m * m for m in margins) / len(margins)), rel=0.15)


@pytest.mark.parametrize(("dtype", "noise", "agrees"), [
    ("float32", 1e-4, True), ("float32", 5e-3, False), ("bfloat16", 0.05, True), ("bfloat16", 0.2, False),
])  # fmt: skip
def test_agreement_depends_on_the_dtype(dtype: str, noise: float, agrees: bool) -> None:
    rows = [checked(str(i), -1.0, -1.0) for i in range(50)]
    fresh = {str(i): [-1.0 + noise, -1.0 - noise] for i in range(50)}
    assert parity.compare(rows, fresh, dtype)["agrees"] is agrees


def test_a_small_bias_is_seen_where_the_noise_hides_it() -> None:
    """0.03 nats on every one of 2,000 tokens passes the absolute limit of bf16 and fails the signed one."""
    rows = [checked(str(i), *[-1.0] * 20) for i in range(100)]
    report = parity.compare(rows, {str(i): [-0.97] * 20 for i in range(100)}, "bfloat16")
    assert report["per_token"]["mean_absolute"] < 0.1
    assert not report["agrees"]


def test_rows_are_reported_by_length() -> None:
    rows = [checked("a", *[-1.0] * 64), checked("b", *[-1.0] * 65), checked("c", *[-1.0] * 2000)]
    report = parity.compare(rows, {r.request.completion_id: r.token_logps for r in rows}, "float32")
    assert [(b["tokens"], b["count"]) for b in report["by_length"]] == [("1-64", 1), ("65-256", 1), ("over 1024", 1)]
    assert len(parity.table({"other": "x", **report})) == 4


def test_rows_are_picked_by_hash_whatever_their_order() -> None:
    names = [f"c{i}" for i in range(1000)]
    picked = parity.pick(names, 10, 0)
    assert len(picked) == 10
    assert parity.pick(reversed(names), 10, 0) == picked != parity.pick(names, 10, 1)
    assert parity.pick(names[:3], 10, 0) == set(names[:3])


def test_every_engine_has_another_one() -> None:
    assert set(parity.OTHER) == set(engines.ENGINES) >= set(parity.OTHER.values())


def test_a_scorer_that_is_not_installed_is_said(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = EngineSettings(policy.resolve(str(tiny_model)), load_chat(tiny_model), "float32", 1.0, 8, 64, 2, 64)
    monkeypatch.setattr(parity.importlib.util, "find_spec", lambda _name: None)
    report = parity.check([checked("a", -1.0)], "transformers", "s", settings, adapter=True)
    assert report["not_checked"] == "the other scorer, vllm, is not installed"
    assert "parity was not checked" in capsys.readouterr().err
    assert "not checked" in parity.table(report)[0]


def test_a_scorer_that_fails_is_said_and_the_cache_stays(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = EngineSettings(policy.resolve(str(tiny_model)), load_chat(tiny_model), "float32", 1.0, 8, 64, 2, 64)

    def broken(*_arguments: object) -> NoReturn:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(parity.engines, "load", broken)
    report = parity.check([checked("a", -1.0)], "fake", "fake-1", settings, adapter=True)
    assert report["not_checked"] == "the other scorer, fake, failed: RuntimeError: no kernel image"
    assert "parity was not checked" in capsys.readouterr().err


def test_disagreement_is_a_warning(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = EngineSettings(policy.resolve(str(tiny_model)), load_chat(tiny_model), "float32", 1.0, 8, 64, 2, 64)
    rows = [CachedLogps(ScoreRequest("a", [1], [7, 8]), [-20.0, -20.0])]
    report = parity.check(rows, "fake", "edited", settings, adapter=True)
    assert (report["scorer"], report["other"], report["agrees"]) == ("edited", "fake-1", False)
    assert "edited and fake-1 disagree" in capsys.readouterr().err
