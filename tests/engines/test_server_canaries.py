"""Canaries: the same every day, no longer than the engine, told apart by the limits of the audit, kept by policy."""

from dataclasses import replace
from pathlib import Path

import pytest

from prefpipe import machine
from prefpipe.engines import server_canaries
from prefpipe.engines.server_canaries import Shelf, both_full, compare, sequences
from prefpipe.forward import load
from tests.engines.standin import settings

pytestmark = pytest.mark.usefixtures("servers")


@pytest.mark.parametrize("longest", [2, 9, 60, 256])
def test_they_are_the_same_every_day_and_fit(longest: int, tiny_model: Path) -> None:
    wanted = settings(tiny_model, max_model_len=longest)
    found = sequences(wanted)
    assert found == sequences(replace(wanted, chat=replace(wanted.chat, date="2031-05-05")))
    assert all(c.prompt_token_ids and c.token_ids for c in found)
    assert max(len(c.prompt_token_ids) + len(c.token_ids) for c in found) <= longest
    assert len({tuple(c.token_ids) for c in found}) > 1 or longest == 2


def test_other_weights_are_outside_of_the_limits_and_noise_inside() -> None:
    values = [-1.0, -2.0] * 200
    same = compare(values, values, full_precision=True)
    assert (same.is_equal, same.agrees, same.absolute) == (True, True, 0.0)
    noise = [v + (0.03 if n % 2 else -0.03) for n, v in enumerate(values)]
    assert compare(noise, values, full_precision=False).agrees
    assert not compare(noise, values, full_precision=True).agrees
    trained = [v + 0.02 for v in noise]  # a shift of all tokens, less than the noise of one
    assert not compare(trained, values, full_precision=False).agrees
    assert compare([v - 0.5 for v in values], values, full_precision=False).signed == pytest.approx(-0.5)


def test_float32_on_both_sides_is_held_to_more() -> None:
    assert both_full("server:vllm-1/float32", "forward-1/float32")
    assert not both_full("server:vllm-1/bfloat16", "forward-1/float32")


def test_values_are_kept_to_the_bit_and_damage_is_no_value(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "canaries")
    assert shelf.values("weights:a") == {}
    values = [-0.1, -1 / 3, -7.25e-9]
    shelf.keep("weights:a", "server:vllm-1/bfloat16", values)
    shelf.keep("weights:a", "forward-1/float32", values[::-1])
    assert shelf.values("weights:a") == {"server:vllm-1/bfloat16": values, "forward-1/float32": values[::-1]}
    assert shelf.policy_with("server:vllm-1/bfloat16", values, "weights:b") == "weights:a"
    assert shelf.policy_with("server:vllm-1/bfloat16", values, "weights:a") is None
    assert shelf.policy_with("server:vllm-2/bfloat16", values, "weights:b") is None
    for text in ("", "[]", "{", '{"values": 3}', "\0"):
        shelf.file("weights:a").write_text(text)
        assert shelf.values("weights:a") == {}
        assert shelf.policy_with("server:vllm-1/bfloat16", values, "weights:b") is None


def test_a_policy_that_does_not_fit_is_not_computed(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = settings(tiny_model)
    monkeypatch.setattr(machine, "available_memory", lambda: 0)
    assert server_canaries.computed_here(sequences(wanted), wanted, adapter=True) is None
    monkeypatch.undo()
    found = server_canaries.computed_here(sequences(wanted), wanted, adapter=True)
    assert found is not None
    assert found[0] == load.scorer_name("float32")
    assert len(found[1]) == sum(len(c.token_ids) for c in sequences(wanted))
