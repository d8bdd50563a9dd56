"""Mixtures of experts in training: their load-balancing loss, and what becomes of it in metrics and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, MixtralConfig, MixtralForCausalLM

from prefpipe.config.train import TrainConfig
from prefpipe.errors import UsageError
from prefpipe.forward.logps import TreeModel, causal_model
from prefpipe.models.policy import resolve
from prefpipe.stages.train import loading, loop
from prefpipe.stages.train.examples import TrainPair
from prefpipe.stages.train.loop import StepMetrics
from tests.forge import Forge
from tests.stages.train import data
from tests.stages.train.runs import two_ranks

SMALL: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral of two layers with four experts each, of which a token takes one: some stay without tokens."""
    directory = tmp_path_factory.mktemp("models") / "mixture"
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=1)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def pairs(mixture: Path) -> list[TrainPair]:
    return data.to_train_pairs(data.with_reference(data.bare_pairs(6, num_prompts=4), mixture))


def settings(mixture: Path, coefficient: float, budget: int = 10**9) -> TrainConfig:
    return data.config(
        mixture, tuning="full", lora_r=16, lora_alpha=32, router_aux_loss_coef=coefficient, train_batch_size=6,
        num_train_epochs=1, max_tokens_per_micro_batch=budget, max_grad_norm=1e9,
    )  # fmt: skip


def first_step(config: TrainConfig, pairs: list[TrainPair]) -> tuple[TreeModel, StepMetrics, torch.Tensor]:
    """The model after one step, its metrics, and the gradient of its routers (Adam's first moment is a tenth of it)."""
    model = loading.load_policy(resolve(config.model), config)
    started = data.trainer(model, config)
    step = next(loop.steps(started, pairs, 0))
    moments = [v.flatten() for k, v in sorted(started.optimizer.state().items()) if "exp_avg/" in k and "gate.w" in k]
    return model, step, torch.cat(moments)


def test_the_load_balancing_loss_is_added_and_reported(
    mixture: Path, pairs: list[TrainPair], capfd: pytest.CaptureFixture[str]
):
    """The mean over completions of transformers' aux_loss; it moves the routers, and the cut changes nothing."""
    _, without, gradient = first_step(settings(mixture, 0.0), pairs)
    assert "aux_loss" not in without.values
    assert "routers of experts are trained too, with router_aux_loss_coef = 0.0" in capfd.readouterr().err
    _, step, moved = first_step(settings(mixture, 0.5), pairs)
    causal = causal_model(loading.load_policy(resolve(str(mixture)), settings(mixture, 0.5)).policy)
    causal.set_attn_implementation("sdpa")
    rows = [[*p.prompt_ids, *side] for p in pairs for side in (p.chosen, p.rejected)]
    with torch.no_grad():
        alone = [float(causal(torch.tensor([row]), output_router_logits=True).aux_loss) for row in rows]
    assert step.values["aux_loss"] == pytest.approx(sum(alone) / len(alone), rel=1e-5)
    assert step.values["loss"] == pytest.approx(without.values["loss"] + 0.5 * step.values["aux_loss"], rel=1e-5)
    assert (moved - gradient).norm() > 0.1 * gradient.norm()
    _, cut, same = first_step(settings(mixture, 0.5, budget=40), pairs)
    assert cut.values["aux_loss"] == pytest.approx(step.values["aux_loss"], rel=1e-5)
    assert (same - moved).norm() <= 1e-5 * moved.norm()


def test_it_is_refused_for_a_model_without_experts(tiny_model: Path):
    with pytest.raises(UsageError, match="no load-balancing loss for llama") as caught:
        loading.load_policy(resolve(str(tiny_model)), data.config(tiny_model, router_aux_loss_coef=0.01))
    assert caught.value.exit_code == 2


@pytest.mark.slow
def test_two_ranks_have_the_gradient_of_one(forged: Forge, mixture: Path, tiny_model: Path, tmp_path: Path):
    """DDP and FSDP2 where ranks use other parameters, or make other numbers of passes, than each other."""
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "image_size": 28, "patch_size": 14}  # fmt: skip
    text = {**SMALL, "head_dim": 16, "sliding_window": 8}
    torch.manual_seed(0)
    seeing = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4))
    seeing.save_pretrained(tmp_path / "towers")
    done = two_ranks(forged, mixture, tmp_path / "towers", tiny_model, module="tests.stages.train.skipping_ranks")
    assert done.code == 0, done.stderr[-4000:]
