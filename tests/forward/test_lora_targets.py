"""Where a LoRA adapter goes in models with experts and in models with towers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import ParamWrapper
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GptOssConfig,
    JambaConfig,
    JambaForCausalLM,
    JetMoeConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from prefpipe.errors import UsageError
from prefpipe.forward import load, lora_targets, merge
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


def mixtral(directory: Path) -> Path:
    torch.manual_seed(0)
    config = MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.2)
    MixtralForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # peft looks for stacked experts among modules
def test_names_that_peft_takes_for_stacked_experts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its word all-linear, and the names of shared experts, would put an adapter on experts and routers."""
    lora = load.add_lora(
        load.load_model(mixtral(tmp_path / "m"), "float32"), r=2, alpha=2, target_modules="all-linear", seed=0
    )
    assert adapted(lora)
    assert all("self_attn" in name for name in adapted(lora))
    shared = Qwen3NextConfig(
        **SMALL, head_dim=16, layer_types=["full_attention"] * 2, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )  # fmt: skip
    lora = load.add_lora(Qwen3NextForCausalLM(shared), r=2, alpha=2, target_modules="all-linear", seed=0)
    assert "leaves out 6 modules that peft would take for stacks of experts" in capfd.readouterr().err
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in adapted(lora) if "lora_" in name} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "shared_expert_gate"
    }  # fmt: skip
    lora = load.add_lora(
        Qwen3NextForCausalLM(shared), r=2, alpha=2, target_modules="q_proj,gate_proj,up_proj,down_proj", seed=0
    )
    assert "peft takes some of these names for stacked experts" in capfd.readouterr().err
    assert any(".experts." in name for name in adapted(lora))
    assert not any("shared_expert." in name for name in adapted(lora))


@pytest.mark.parametrize(
    "targets", ["mlp.experts.gate_up_proj, mlp.experts.down_proj", "experts.down_proj,gate.weight"]
)
def test_experts_are_adapted_by_the_names_of_their_parameters(
    targets: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Shared rows are right, an adapter from disk has the same log-probs, here and for peft alone, and so has a model
    with the adapter in its weights."""
    directory, trees = mixtral(tmp_path / "m"), [Tree([5, 6, 7], [[8, 9, 4, 4], [10, 11]]), Tree([6, 7], [[3, 12]])]
    lora = load.add_lora(
        load.load_model(directory, "float32"), r=2, alpha=4, target_modules="q_proj", target_parameters=targets, seed=0
    )
    assert ("trains 2 routers of experts" in capfd.readouterr().err) == ("gate.weight" in targets)
    assert sum("lora_A" in name for name in adapted(lora)) == 2 * 3
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    model = TreeModel(lora)
    assert settle_rows(model, trees, "float32") is None
    values = model(model.layout(trees))
    with torch.no_grad(), load.adapter_off(lora, off=True):
        assert (model(model.layout(trees)) - values).abs().max() > 0.1
    values.sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in lora.parameters() if p.requires_grad)
    load.save_adapter(lora, load.adapter_tensors(lora), tmp_path / "a", "base")
    (tmp_path / "merged").mkdir()
    merge.save_merged(directory, tmp_path / "a", "float32", tmp_path / "merged")
    for again in (
        load.load_adapter(load.load_model(directory, "float32"), tmp_path / "a", trainable=False),
        PeftModel.from_pretrained(load.load_model(directory, "float32"), tmp_path / "a"),
        load.load_model(tmp_path / "merged", "float32"),
    ):
        tree = TreeModel(again)
        torch.testing.assert_close(tree(tree.layout(trees)), values, rtol=1e-5, atol=1e-5)


MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
TWO = ("gate_up_proj", "down_proj")


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (lambda: MixtralConfig(**SMALL, **MIXTURE), [f"mlp.experts.{name}" for name in TWO]),
        # Biases of experts are stacked too.
        (lambda: GptOssConfig(**SMALL, **MIXTURE, head_dim=16), [f"mlp.experts.{name}" for name in TWO]),
        # A layer without experts.
        (
            lambda: Qwen2MoeConfig(
                **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[0],
                shared_expert_intermediate_size=16,
            ),
            [f"mlp.experts.{name}" for name in TWO],
        ),
        # A convolution beside the experts.
        (
            lambda: JambaConfig(
                **SMALL, attn_layer_period=2, attn_layer_offset=1, num_experts=4, num_experts_per_tok=2, mamba_d_state=4
            ),
            [f"feed_forward.experts.{name}" for name in TWO],
        ),
        # Experts of attention.
        (
            lambda: JetMoeConfig(
                **{k: v for k, v in SMALL.items() if k != "num_attention_heads"}, **MIXTURE, kv_channels=8
            ),
            [
                f"{part}{name}.weight"
                for part in ("mlp.", "self_attention.experts.")
                for name in ("input_linear", "output_linear")
            ],
        ),
    ],
)  # fmt: skip
def test_all_experts_are_the_stacked_matrices_of_any_mixture(
    config: Callable[[], PretrainedConfig], names: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither routers nor biases; each gets a gradient."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config()).requires_grad_(requires_grad=False)
    assert lora_targets.experts_of(model) == sorted(names)
    matrices = sum(lora_targets.matches(name, names) for name, _ in model.named_parameters())
    load.attention.register()
    lora = load.add_lora(model, r=2, alpha=2, target_modules="all-linear", target_parameters="all-experts", seed=0)
    assert "trains" not in capfd.readouterr().err
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    tree = TreeModel(lora, "single")
    tree(tree.layout([Tree([5, 6, 7], [[8, 9], [10]])])).sum().backward()
    adapters = [module for module in lora.modules() if isinstance(module, ParamWrapper)]
    assert len(adapters) == matrices
    for parameter in (p for module in adapters for p in (*module.lora_A.parameters(), *module.lora_B.parameters())):
        assert parameter.grad is not None
        assert parameter.grad.norm() > 0


def test_a_model_without_stacked_experts_is_refused(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match="llama has no stacked experts"):
        load.add_lora(
            load.load_model(tiny_model, "float32"), r=2, alpha=2, target_modules="q_proj",
            target_parameters="all-experts", seed=0,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("targets", "message"),
    [("experts.w1", "the model has no parameter experts.w1"), ("q_proj.weight", "belongs to a linear module"),
     ("experts.down_proj,norm.weight", "belongs to a linear module, an embedding or a norm")],
)  # fmt: skip
def test_parameters_that_take_no_adapter_are_refused(targets: str, message: str, tmp_path: Path) -> None:
    base = load.load_model(mixtral(tmp_path / "m"), "float32")
    with pytest.raises(UsageError, match=message):
        load.add_lora(base, r=2, alpha=2, target_modules="q_proj", target_parameters=targets, seed=0)


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
