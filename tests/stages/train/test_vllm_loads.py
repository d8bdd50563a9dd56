"""vLLM loads what training saves: a model whose every weight was trained, a merged one, and an adapter on its base."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefpipe import engines
from prefpipe.engines.base import Draw, EngineSettings, Request, Sample
from prefpipe.models.chat import load_chat
from prefpipe.models.encoding import encode
from prefpipe.models.policy import resolve
from prefpipe.stages.train import stage
from tests.stages.train import data

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]  # vLLM's own warnings are not ours to fix

MAX_TOKENS = 12
PROMPTS = ("owl", "a river at night", "salt", "why do kettles sing?")


@dataclass(frozen=True)
class Trained:
    """Outputs of a run of full fine-tuning and of a LoRA run with a merged model."""

    full: Path
    lora: Path


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    pairs = data.write_pairs(folder / "p", data.bare_pairs(8))
    full = {"tuning": "full", "lora_r": 16, "lora_alpha": 32, "learning_rate": 1e-2}
    stage.run(data.config(tiny_model, pairs, **full), folder / "full", force=False)
    stage.run(data.config(tiny_model, pairs, merge=True, learning_rate=3e-2), folder / "lora", force=False)
    return Trained(folder / "full", folder / "lora")


def sampled(model: Path, adapter: str = "none") -> list[Sample]:
    """Greedy completions by vLLM, with their log-probs."""
    chat = load_chat(model)
    policy = resolve(str(model), adapter)
    given = [Request(text, encode(chat, text), (Draw(0, 0, 0.0),)) for text in PROMPTS]
    with engines.load("vllm", EngineSettings(policy, chat, "float32", 1.0, MAX_TOKENS, 64, 4, 64)) as engine:
        found = {request.prompt_id: samples[0] for request, samples in engine.generate(given)}
    return [found[text] for text in PROMPTS]


def greedy(model: Path) -> tuple[list[list[int]], list[list[float]]]:
    """The same by transformers alone: token ids, and the log-prob of each."""
    chat, loaded = load_chat(model), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids: list[list[int]] = []
    logps: list[list[float]] = []
    for text in PROMPTS:
        prompt = torch.tensor([encode(chat, text)])
        out = loaded.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=MAX_TOKENS,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        own = out.sequences[0, prompt.shape[1] :]
        scores = torch.cat(out.logits).log_softmax(-1)
        ids.append(own.tolist())
        logps.append(scores.gather(1, own.unsqueeze(1))[:, 0].tolist())
    return ids, logps


@pytest.mark.parametrize(("run", "folder"), [("full", "model"), ("lora", "merged")])
def test_vllm_says_what_transformers_says(trained: Trained, tiny_model: Path, run: str, folder: str) -> None:
    model = getattr(trained, run) / folder
    ids, logps = greedy(model)
    assert ids != greedy(tiny_model)[0], "training changed no answer"
    found = sampled(model)
    assert [s.token_ids for s in found] == ids
    for sample, expected in zip(found, logps, strict=True):
        assert sample.token_logps == pytest.approx(expected, abs=1e-3)


def test_the_adapter_on_its_base_says_what_the_merged_model_says(trained: Trained, tiny_model: Path) -> None:
    ids, logps = greedy(trained.lora / "merged")
    found = sampled(tiny_model, str(trained.lora / "adapter"))
    assert [s.token_ids for s in found] == ids
    for sample, expected in zip(found, logps, strict=True):
        assert sample.token_logps == pytest.approx(expected, abs=2e-3)
