"""A model reference becomes files with an identity, or an error that says what is missing or does not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from prefpipe.errors import DataError, IdentityError, MissingInputError, UsageError
from prefpipe.models import fingerprint, policy
from prefpipe.models.policy import (
    _LATE_POSITIONS,
    EMBEDDED,
    _memoised_digest,
    adapter_base_record,
    context_length,
    platformdirs,
    resolve,
)
from tests.conftest import Call, Write


def adapter(directory: Path, base_weights: str | None) -> Path:
    directory.mkdir(parents=True)
    save_file({"lora_A": torch.ones(2, 2)}, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    if base_weights is not None:
        (directory / "prefpipe.json").write_text(adapter_base_record(base_weights))
    return directory


def test_a_directory_is_a_model(tiny_model: Path) -> None:
    policy = resolve(str(tiny_model))
    assert policy.directory == tiny_model
    assert policy.adapter is None
    assert policy.id == policy.base_id == f"weights:{fingerprint.weights_digest(tiny_model)}"


def test_other_weights_are_another_policy(tiny_model: Path, other_model: Path) -> None:
    assert resolve(str(tiny_model)).id != resolve(str(other_model)).id


def test_a_copy_is_the_same_policy(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "copy")
    assert resolve(str(tmp_path / "copy")).id == resolve(str(tiny_model)).id


def test_weights_that_change_in_place_are_noticed(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    before = resolve(str(tmp_path / "m")).id
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    assert resolve(str(tmp_path / "m")).id != before


def test_an_adapter_is_part_of_the_policy(tiny_model: Path, tmp_path: Path) -> None:
    base = resolve(str(tiny_model))
    path = adapter(tmp_path / "a", base.weights)
    policy = resolve(str(tiny_model), str(path))
    assert policy.adapter == path
    assert policy.id == f"{base.id}+adapter:{fingerprint.adapter_digest(path)}"
    assert policy.base_id == base.id


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c", "../absent", "absent"])
def test_a_missing_directory(name: str) -> None:
    with pytest.raises(MissingInputError, match="is not a directory") as caught:
        resolve(name)
    assert name in caught.value.message
    assert caught.value.exit_code == 66


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(MissingInputError, match="is not a directory"):
        resolve(str(tmp_path / "file"))


def test_a_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"no config\.json"):
        resolve(str(tmp_path))


def test_a_directory_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle, which is never read")
    with pytest.raises(MissingInputError, match="has no weights") as caught:
        resolve(str(tmp_path))
    assert "safetensors" in caught.value.hint


def test_an_unknown_embedded_model_lists_the_known_ones() -> None:
    with pytest.raises(MissingInputError, match="no embedded model 'smollm3'") as caught:
        resolve("embedded:smollm3")
    assert all(name in caught.value.hint for name in EMBEDDED)


def test_a_missing_adapter(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"absent is not a PEFT adapter"):
        resolve(str(tiny_model), str(tmp_path / "absent"))


def test_a_run_in_place_of_its_adapter_is_told_which_folder(tiny_model: Path, tmp_path: Path) -> None:
    path = adapter(tmp_path / "run" / "adapter", None)
    with pytest.raises(MissingInputError, match="run is not a PEFT adapter") as caught:
        resolve(str(tiny_model), str(tmp_path / "run"))
    assert caught.value.hint == f"give {path}"


def test_an_adapter_of_another_base_is_refused_with_both_names(
    tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    other = resolve(str(other_model))
    path = adapter(tmp_path / "a", other.weights)
    with pytest.raises(IdentityError, match=f"was trained on base {other.id}") as caught:
        resolve(str(tiny_model), str(path))
    assert resolve(str(tiny_model)).id in caught.value.message
    assert caught.value.exit_code == 76


def test_an_adapter_of_unknown_base_is_used_with_a_warning(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = adapter(tmp_path / "a", None)
    assert resolve(str(tiny_model), str(path)).adapter == path
    assert "warning: " in capfd.readouterr().err


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_damaged_base_record_is_named(tiny_model: Path, tmp_path: Path, text: str) -> None:
    path = adapter(tmp_path / "a", None)
    (path / "prefpipe.json").write_text(text)
    with pytest.raises(DataError, match=r"prefpipe\.json"):
        resolve(str(tiny_model), str(path))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "peft_type 'PROMPT_TUNING'"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({}, "peft_type None"),
        ({"peft_type": "LORA", "alora_invocation_tokens": [5]}, "with alora_invocation_tokens"),
        ({"peft_type": "LORA", "layer_replication": [[0, 2], [1, 2]]}, "with layer_replication"),
    ],
)
def test_an_adapter_that_is_no_lora_is_refused_by_its_kind(
    tiny_model: Path, tmp_path: Path, config: dict[str, object], words: str
) -> None:
    path = adapter(tmp_path / "a", None)
    (path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=f"is not a LoRA adapter: .*{words}") as caught:
        resolve(str(tiny_model), str(path))
    assert caught.value.exit_code == 2


def test_a_command_refuses_such_an_adapter(call: Call, tiny_model: Path, tmp_path: Path, write: Write) -> None:
    path = adapter(tmp_path / "a", None)
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "PREFIX_TUNING"}))
    rows = write({"prompt": "a", "chosen": "b", "rejected": "c"})
    done = call("score", "--model", tiny_model, "--adapter", path, "--inputs", rows, "--out", tmp_path / "s")
    assert done.code == 2
    assert "is not a LoRA adapter: peft_type 'PREFIX_TUNING'" in done.stderr


def test_a_flipped_bit_in_an_adapter_of_ours_is_noticed(tiny_model: Path, tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", None)
    base, digest = resolve(str(tiny_model)).weights, fingerprint.adapter_digest(path)
    (path / "prefpipe.json").write_text(adapter_base_record(base, digest))
    assert resolve(str(tiny_model), str(path)).adapter_weights == digest
    tensors = path / "adapter_model.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(DataError, match=f"prefpipe.json says {digest}"):
        resolve(str(tiny_model), str(path))


def test_large_weights_are_hashed_once_and_again_when_they_change(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process (here: with its memory cleared) finds the digest; another state of the files does not."""
    hashed: list[Path] = []
    plain = fingerprint.weights_digest

    def counted(directory: Path) -> str:
        hashed.append(directory)
        return plain(directory)

    monkeypatch.setattr(policy, "_LARGE", 1)
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda _name: tmp_path / "cache")
    monkeypatch.setattr(fingerprint, "weights_digest", counted)
    shutil.copytree(tiny_model, tmp_path / "m")

    def digest() -> str:
        _memoised_digest.cache_clear()
        return resolve(str(tmp_path / "m")).weights

    first = digest()
    assert (digest(), len(hashed)) == (first, 1)
    (tmp_path / "m" / "model.safetensors").touch()
    assert (digest(), len(hashed)) == (first, 2)
    for kept in (tmp_path / "cache" / "digests").iterdir():
        kept.write_text("damaged")
    assert (digest(), len(hashed)) == (first, 3)


def test_the_context_of_a_model(tiny_model: Path, tmp_path: Path) -> None:
    assert context_length(tiny_model) == 1024
    (tmp_path / "config.json").write_text("{}")
    assert context_length(tmp_path) is None


@pytest.mark.parametrize("kind", ["bert", *sorted(_LATE_POSITIONS)])
@pytest.mark.filterwarnings("ignore")  # of single architectures, about their sizes
def test_an_encoder_takes_as_many_tokens_as_its_context(tmp_path: Path, kind: str) -> None:
    """RoBERTa and those like it number the tokens of a text from the padding token on."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CONFIG_MAPPING[kind](
        **sizes, vocab_size=32, max_position_embeddings=12, pad_token_id=1, type_vocab_size=2, attention_window=[4],
        entity_vocab_size=4, entity_emb_size=8, default_language="en_XX",
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config).eval()
    config.save_pretrained(tmp_path)
    context = context_length(tmp_path)
    assert context == (12 if kind == "bert" else 10)
    model(input_ids=torch.arange(4, 4 + context).unsqueeze(0))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.arange(4, 5 + context).unsqueeze(0))


@pytest.mark.parametrize(
    ("config", "context"),
    [
        *(({name: 77}, 77) for name in ("n_positions", "n_ctx", "max_sequence_length", "seq_length")),
        ({"text_config": {"max_position_embeddings": 77}, "vision_config": {"max_position_embeddings": 9}}, 77),
        ({"text_config": {"max_position_embeddings": 77}, "max_position_embeddings": 9}, 77),
        ({"text_config": {}, "n_positions": 77}, 77),
        ({"text_config": None, "max_position_embeddings": None, "n_ctx": 77}, 77),
        ({"max_position_embeddings": -1}, None),
        ({"model_type": "roberta", "max_position_embeddings": 514}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 3}, 510),
        ({"model_type": "bert", "max_position_embeddings": 512, "pad_token_id": 0}, 512),
    ],
)
def test_the_context_under_its_other_names(tmp_path: Path, config: dict[str, Any], context: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context_length(tmp_path) == context


@pytest.mark.parametrize(
    ("name", "value", "is_refused"),
    [
        ("num_hidden_layers", 10**400, True), ("n_layer", 10_001, True), ("num_layers", 10_000, False),
        ("hidden_size", 2**63, True), ("model_max_length", 10**30, False),
        ("vocab_size_per_layer_input", 262144, False),
    ],
)  # fmt: skip
def test_a_number_that_no_model_has(
    tiny_model: Path, tmp_path: Path, name: str, value: int, *, is_refused: bool
) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for values in ({name: value}, {"text_config": {name: value}}):
        (tmp_path / "m" / "config.json").write_text(json.dumps(config | values))
        if is_refused:
            with pytest.raises(DataError, match=rf"config\.json: {name} is more than"):
                resolve(str(tmp_path / "m"))
        else:
            assert resolve(str(tmp_path / "m")).weights
