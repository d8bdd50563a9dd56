"""Where a LoRA adapter goes in models with experts and in models with towers."""

from pathlib import Path

import pytest
import torch
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    JambaConfig,
    JambaForCausalLM,
    LlamaForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
)

from prefpipe.forward import load, lora_targets
from prefpipe.forward.layout import Tree
from prefpipe.forward.logps import TreeModel, settle_rows

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def phimoe(directory: Path) -> Path:
    torch.manual_seed(0)
    config = PhimoeConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.2)
    PhimoeForCausalLM(config).save_pretrained(directory)
    return directory


def vision() -> PreTrainedModel:
    text = {**SMALL, "head_dim": 16, "sliding_window": 8}
    tower = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4))


def adapted(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_plain_model_keeps_the_word(tiny_model: Path) -> None:
    """Names in its place would change the settings of every adapter."""
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    assert lora_targets.all_linear(model) == "all-linear"
    assert not lora_targets.may_skip_parameters(model)


def test_routers_are_left_out_and_the_log_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load.load_model(phimoe(tmp_path / "m"), "float32")
    routers = lora_targets.routers(model)
    assert len(routers) == 2
    lora = load.add_lora(model, r=2, alpha=2, target_modules="all-linear", seed=0)
    assert "leaves out 2 routers" in capfd.readouterr().err
    assert not any("router" in name for name in adapted(lora))
    assert any("q_proj" in name for name in adapted(lora))
    tree = TreeModel(lora)
    assert settle_rows(tree, [Tree([5, 6, 7], [[8, 9], [10]])], "float32") is None
    tree(tree.layout([Tree([5, 6, 7], [[8, 9], [10]])])).sum().backward()


def test_a_linear_router_that_is_named_is_trained_with_a_warning(capfd: pytest.CaptureFixture[str]) -> None:
    model = JambaForCausalLM(
        JambaConfig(**SMALL, num_experts=4, num_experts_per_tok=2, use_mamba_kernels=False, mamba_d_state=4)
    )
    assert lora_targets.routers(model)
    assert not set(lora_targets.all_linear(model)) & lora_targets.routers(model)
    lora = load.add_lora(model, r=2, alpha=2, target_modules="q_proj,router", seed=0)
    assert "evenly loaded is router_aux_loss_coef" in capfd.readouterr().err
    assert any("router" in name for name in adapted(lora))


def test_weights_that_mamba_reads_past_an_adapter_are_left_out() -> None:
    """Their adapters would be refused (Falcon-H1) or get no gradient (Jamba)."""
    mamba = {"mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_n_groups": 1}
    for model in (
        JambaForCausalLM(JambaConfig(**SMALL, num_experts=1, mamba_d_state=4)),
        FalconH1ForCausalLM(FalconH1Config(**SMALL, **mamba, mamba_chunk_size=8)),
    ):
        lora = TreeModel(
            load.add_lora(model.requires_grad_(requires_grad=False), r=2, alpha=2, target_modules="all-linear", seed=0),
            "separate",
        )
        trained = adapted(lora)
        assert any("in_proj" in name for name in trained)
        lora(lora.layout([Tree([5, 6, 7], [[8, 9], [10]])])).sum().backward()
        assert {name for name, p in lora.named_parameters() if p.grad is not None} == trained


def test_towers_are_not_adapted_and_not_trained() -> None:
    model = vision()
    lora_targets_of_text = lora_targets.all_linear(model)
    assert lora_targets_of_text != "all-linear"
    assert all("language_model" in name for name in lora_targets_of_text)
    load.train_all(model)
    trained = adapted(model)
    assert trained
    assert not any("vision" in name or "projector" in name for name in trained)
    assert lora_targets.may_skip_parameters(model)
