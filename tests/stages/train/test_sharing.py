"""Runs that share their rows and a base model are those that `train` makes alone, byte for byte; what they share is
read, loaded, scored and probed once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from prefpipe.errors import DataError, PrefpipeError, UsageError
from prefpipe.forward import load
from prefpipe.runs import store
from prefpipe.schemas import Pair
from prefpipe.stages.train import inputs, loop, stage
from prefpipe.stages.train.session import Paused
from prefpipe.stages.train.sharing import Shared
from tests.stages.train import data
from tests.stages.train.runs import adapter, metrics

EVALUATED: dict[str, Any] = {"eval_split": 0.4, "eval_steps": 2, "max_tokens_per_micro_batch": 256}


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a run that its digest covers, and the manifest with it."""
    manifest = store.read_manifest(out)
    return {name: (out / name).read_bytes() for name in (*manifest["files"], "manifest.json")}


@pytest.mark.slow
def test_what_shares_is_what_train_makes_alone_to_the_byte(tiny_model: Path, rows: list[Pair], tmp_path: Path) -> None:
    """Losses with and without a reference, ranks, seeds of nothing but the adapter, dropout; pairs of which some have
    no reference log-probs: one reference pass, one audit, one load."""
    some = data.write_pairs(tmp_path / "p", [*rows[:6], *data.bare_pairs(10)[6:]])
    variants: list[dict[str, Any]] = [
        {},
        {"loss_type": ("ipo",), "beta": 0.3, "lora_dropout": 0.2},
        {"loss_type": ("simpo",), "beta": 2.0, "lora_r": 2},
        {"lora_r": 8, "lora_target_modules": "q_proj,v_proj", "use_rslora": True},
    ]
    configs = [data.config(tiny_model, some, **EVALUATED, **changes) for changes in variants]
    shared = Shared(inputs.prepare(configs[0]))
    for number, config in enumerate(configs):
        stage.run(config, tmp_path / f"shared-{number}", force=False, shared=shared)
        stage.run(config, tmp_path / f"alone-{number}", force=False)
        assert contents(tmp_path / f"shared-{number}") == contents(tmp_path / f"alone-{number}"), number
    assert (shared.loads, shared.reference.passes) == (1, 1)
    assert len({adapter(tmp_path / f"shared-{number}") for number in range(4)}) == 4


@pytest.mark.slow
def test_a_cached_reference_needs_no_pass_and_an_audit_alone(
    tiny_model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A larger adapter is probed again, a smaller one is not; full fine-tuning has its weights for itself."""
    plain = data.config(tiny_model, pairs)
    shared, scored = Shared(inputs.prepare(plain)), list[int]()
    told = stage.values._score_together  # type: ignore[attr-defined]  # private: counted here
    monkeypatch.setattr(stage.values, "_score_together", lambda *arguments: scored.append(1) or told(*arguments))
    for number, changes in enumerate(({"lora_r": 4}, {"lora_r": 2}, {"lora_r": 8})):
        stage.run(data.config(tiny_model, pairs, **changes), tmp_path / str(number), force=False, shared=shared)
    assert (shared.loads, shared.probes, shared.reference.passes, len(scored)) == (1, 2, 0, 1)
    full = {"tuning": "full", "lora_r": 16, "lora_alpha": 32, "num_train_epochs": 1}
    config = data.config(tiny_model, pairs, **full)
    stage.run(config, tmp_path / "full", force=False, shared=shared)
    stage.run(config, tmp_path / "alone", force=False)
    assert contents(tmp_path / "full") == contents(tmp_path / "alone")
    assert shared.loads == 2
    stage.run(data.config(tiny_model, pairs, seed=3), tmp_path / "after", force=False, shared=shared)
    stage.run(data.config(tiny_model, pairs, seed=3), tmp_path / "after-alone", force=False)
    assert adapter(tmp_path / "after") == adapter(tmp_path / "after-alone")


def test_a_pause_is_no_end(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    """A run that pauses and goes on, between two others, is the uninterrupted one."""
    config = data.config(tiny_model, pairs, save_steps=50, max_tokens_per_micro_batch=256)
    shared = Shared(inputs.prepare(config))
    with pytest.raises(Paused):
        stage.run(config, tmp_path / "t", force=False, shared=shared, until=2)
    assert [path.name for path in (tmp_path / "t" / "checkpoints").iterdir()] == ["step-00000002"]
    assert len(metrics(tmp_path / "t")) == 2
    stage.run(data.config(tiny_model, pairs, beta=0.5), tmp_path / "other", force=False, shared=shared)
    stage.run(config, tmp_path / "t", force=False, shared=shared)
    stage.run(config, tmp_path / "alone", force=False)
    assert contents(tmp_path / "t") == contents(tmp_path / "alone")
    assert shared.loads == 1


def test_a_run_that_fails_leaves_the_base_as_it_was(
    tiny_model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = data.config(tiny_model, pairs, max_tokens_per_micro_batch=256)
    shared = Shared(inputs.prepare(config))

    def fail(*_: object, **__: object) -> None:
        raise PrefpipeError("it broke", "")

    with monkeypatch.context() as broken:
        broken.setattr(loop, "row_losses", fail)
        with pytest.raises(PrefpipeError, match="it broke"):
            stage.run(config, tmp_path / "broken", force=False, shared=shared)
    stage.run(config, tmp_path / "t", force=False, shared=shared)
    stage.run(config, tmp_path / "alone", force=False)
    assert adapter(tmp_path / "t") == adapter(tmp_path / "alone")
    assert shared.loads == 1


def test_checkpointing_is_put_on_a_base_once(tiny_model: Path) -> None:
    model = load.load_model(tiny_model, "float32")
    load.checkpoint_layers(model)
    before = [layer.forward for layer in load.decoder_layers(model)]
    load.checkpoint_layers(model)
    assert [layer.forward for layer in load.decoder_layers(model)] == before


def test_an_adapter_on_experts_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    """On modules and on stacked parameters: the same object, the same weights, nothing trainable."""
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=264, hidden_size=16, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1, head_dim=16, num_experts=2, num_experts_per_tok=1,
        )
    ).save_pretrained(tmp_path)  # fmt: skip
    base = load.load_model(tmp_path, "float32")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for seed in range(2):
        adapted = load.add_lora(
            base, r=2, alpha=4, target_modules="q_proj", target_parameters="mlp.experts.down_proj", seed=seed
        )
        assert any(p.requires_grad for p in adapted.parameters())
        assert load.with_adapter(adapted, None) is base
        after = base.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert not any(p.requires_grad for p in base.parameters())


def test_rows_are_those_of_the_settings(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    """What `prepare` refuses is refused; a loss without reference has none. The rows lie where the first run put
    them."""
    shared = Shared(inputs.prepare(data.config(tiny_model, pairs)))
    assert shared.data is not None
    assert shared.rows_for(data.config(tiny_model, pairs, beta=0.7)) is shared.data
    free = data.config(tiny_model, pairs, loss_type=("simpo",), beta=2.0)
    assert shared.rows_for(free) == replace(inputs.prepare(free), stored=shared.data.stored)
    with pytest.raises(DataError, match="preference_prob"):
        shared.rows_for(data.config(tiny_model, pairs, loss_type=("soft",)))
    with pytest.raises(UsageError, match="trains on labels"):
        shared.rows_for(data.config(tiny_model, pairs, loss_type=("kto",)))
