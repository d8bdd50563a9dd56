"""Rows that grow in a cache, against plain forward passes of transformers, whatever the attention of the model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefpipe.forward.cached import CachedModel
from prefpipe.forward.load import load_model
from prefpipe.forward.logps import TreeModel, plain_attention
from tests.zoo import runnable

# Grouped queries, a window of 16 tokens, capped scores, sinks with a window, values of another size, learned positions.
ARCHITECTURES = ("llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "gpt2")
LENGTHS = (3, 20, 9)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_of_any_lengths_equal_plain_passes(tmp_path: Path, name: str) -> None:
    """Prompts of 3, 20 and 9 tokens, the first for two rows; then 14 tokens more in each, past the window and past the
    cache's first size; a row is copied into the slot of another on the way."""
    directory = runnable.of_architecture(name, tmp_path / "m")
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    plain.set_attn_implementation(plain_attention(plain))
    model = CachedModel(load_model(directory, "float32"))
    torch.manual_seed(0)
    prompts = [torch.randint(3, 250, (length,)).tolist() for length in LENGTHS]

    def behind(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return plain(torch.tensor([ids])).logits[0, -1].float()

    found = model.prompts(prompts, [[0, 3], [1], [2]])
    torch.testing.assert_close(found, torch.stack([behind(ids) for ids in prompts]), atol=2e-4, rtol=1e-4)
    rows = [list(prompts[number]) for number in (0, 1, 2, 0)]
    for step in range(14):
        if step == 7:
            model.copy(3, 1, len(rows[3]))
            rows[1] = list(rows[3])
        tokens = torch.randint(3, 250, (4,)).tolist()
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
        found = model.step(tokens, [len(row) - 1 for row in rows])
        torch.testing.assert_close(found, torch.stack([behind(row) for row in rows]), atol=2e-4, rtol=1e-4)


def test_a_scoring_pass_between_two_steps_disturbs_neither(tiny_model: Path) -> None:
    policy = load_model(tiny_model, "float32")
    model = CachedModel(policy)
    first = model.prompts([[5, 6, 7]], [[0]])
    TreeModel(policy)  # sets the attention over trees
    step = model.step([8], [3])
    again = CachedModel(policy)
    torch.testing.assert_close(again.prompts([[5, 6, 7]], [[0]]), first)
    torch.testing.assert_close(again.prompts([[5, 6, 7, 8]], [[0]]), step, atol=1e-5, rtol=1e-5)
