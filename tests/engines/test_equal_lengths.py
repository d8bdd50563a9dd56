"""Batches of prompts of one length, for models whose rows must begin together."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GenerationConfig

from prefpipe import engines
from prefpipe.engines.base import Draw, EngineSettings, Request
from prefpipe.engines.equal_lengths import batches
from prefpipe.models.chat import load_chat
from prefpipe.models.policy import resolve
from tests.zoo import runnable


@pytest.mark.parametrize("name", ["lfm2", "mamba2", "rwkv"])
def test_a_recurrent_model_samples_each_prompt_as_if_it_were_alone(tmp_path: Path, name: str) -> None:
    """Prompts of two lengths, each with two greedy draws and a sampled one: greedy ones equal transformers' own, and a
    sampled one is the same without the others."""
    model = runnable.of_architecture(name, tmp_path / "m")
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    prompts = {"a": [5, 9, 30, 7], "b": [40, 8, 8, 61], "c": [11, 12, 13, 14, 15, 16, 17]}
    draws = (Draw(0, 0, 0.0), Draw(1, 0, 0.0), Draw(2, 7, 1.0))
    settings = EngineSettings(resolve(str(model)), load_chat(model), "float32", 1.0, 10, 64, 9, 64)
    with engines.load("transformers", settings) as engine:
        found = {r.prompt_id: s for r, s in engine.generate(Request(n, ids, draws) for n, ids in prompts.items())}
        ((_, [alone]),) = engine.generate([Request("b", prompts["b"], draws[2:])])
    config = GenerationConfig(do_sample=False, max_new_tokens=10, eos_token_id=sorted(settings.stops), pad_token_id=0)
    for key, ids in prompts.items():
        expected = plain.generate(torch.tensor([ids]), generation_config=config)[0, len(ids) :].tolist()
        assert [s.token_ids for s in found[key][:2]] == [expected, expected]
    assert found["b"][2].token_ids == alone.token_ids


@limits(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), max_size=20),
    st.integers(1, 8),
)
def testbatches_hold_every_request_once_within_the_limit(shapes: list[tuple[int, int]], max_rows: int) -> None:
    """One length per batch; more rows than max_rows only when one request alone has more."""
    given_ = [
        Request(str(i), [0] * length, tuple(Draw(k, 0, 1.0) for k in range(draws)))
        for i, (length, draws) in enumerate(shapes)
    ]
    found = list(batches(given_, max_rows))
    assert sorted(r.prompt_id for b in found for r in b) == sorted(r.prompt_id for r in given_)
    for batch in found:
        assert len({len(r.prompt_token_ids) for r in batch}) == 1
        assert len(batch) == 1 or sum(len(r.draws) for r in batch) <= max_rows
