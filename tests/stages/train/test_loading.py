"""The model of a run as it will train: its adapter, its vocabulary, and what the free memory makes of it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer

from prefpipe.errors import DataError, IdentityError
from prefpipe.models.policy import resolve
from prefpipe.stages.train import loading
from tests.stages.train import data
from tests.tiny import make_adapter


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_what_is_trained(tiny_model: Path, tmp_path: Path):
    """A new adapter, an adapter from disk with its values, every weight; of a reference nothing."""
    config = data.config(tiny_model)
    new = loading.load_policy(resolve(str(tiny_model)), config)
    assert trainable(new)
    assert all("lora_" in name for name in trainable(new))
    adapted = resolve(str(tiny_model), str(make_adapter(tiny_model, tmp_path / "a", 1)))
    continued = loading.load_policy(adapted, config)
    assert all("lora_" in name for name in trainable(continued))
    assert any(bool(p.any()) for name, p in continued.named_parameters() if "lora_B" in name)
    full = loading.load_policy(resolve(str(tiny_model)), config.model_copy(update={"tuning": "full"}))
    assert trainable(full) == {name for name, _ in full.named_parameters()}
    assert not trainable(loading.load_reference(adapted, config))
    assert not trainable(loading.load_reference(resolve(str(tiny_model)), config))


def test_a_token_id_beyond_the_vocabulary(tiny_model: Path):
    """The tiny model has 264 tokens: the last one is 263, in a prompt as in a completion."""
    model = data.policy(tiny_model)
    (row,) = data.to_train_pairs(data.bare_pairs(1))
    loading.check_vocabulary(model, [replace(row, prompt_ids=(263,), rejected=(263,))])
    for wrong in (replace(row, prompt_ids=(264,)), replace(row, rejected=(1, 264))):
        with pytest.raises(IdentityError, match="token id 264, but the model has 264 tokens"):
            loading.check_vocabulary(model, [row, wrong])


def test_a_token_id_that_the_tokenizer_of_the_model_has(tiny_model: Path, tmp_path: Path):
    """Rows of a run with the same tokenizer: not they are wrong, the embedding is too small."""
    shutil.copytree(tiny_model, tmp_path / "m")
    tokenizer = Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(f"<|{n}|>", special=True) for n in range(259, 265)])
    tokenizer.save(str(tmp_path / "m" / "tokenizer.json"))
    (row,) = data.to_train_pairs(data.bare_pairs(1))
    with pytest.raises(DataError, match="token id 264, which the tokenizer of the model has, but the model has 264"):
        loading.check_vocabulary(data.policy(tmp_path / "m"), [replace(row, rejected=(1, 264))])


def test_a_budget_that_is_given_needs_no_probe(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading.memory, "fitting", None)
    config = data.config(tiny_model, max_tokens_per_micro_batch=77, gradient_checkpointing="off")
    assert loading.fitting_tokens(data.policy(tiny_model), [], config) == 77


def test_checkpointing_turns_itself_on_only_when_a_row_does_not_fit(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    rows = data.to_train_pairs(data.bare_pairs(6))
    for free, setting, turned_on in ((1e12, "auto", 0), (1.0, "auto", 1), (1.0, "off", 0), (1e12, "on", 1)):
        calls: list[object] = []
        monkeypatch.setattr("prefpipe.stages.train.memory.free_bytes", lambda _device, free=free: free)
        monkeypatch.setattr("prefpipe.forward.load.checkpoint_layers", calls.append)
        config = data.config(tiny_model, gradient_checkpointing=setting)
        loading.fitting_tokens(data.policy(tiny_model), rows, config)
        assert len(calls) == turned_on, (free, setting)
    assert "does not fit the free memory" in capsys.readouterr().err
