"""A digest follows the content: it ignores names of files and paths, and nothing that changes what a model computes."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from prefpipe.errors import DataError, MissingInputError
from prefpipe.ids import canonical_json
from prefpipe.models import fingerprint

CONFIG = {"model_type": "llama", "rope_theta": 10000.0, "hidden_size": 4}
ADAPTER = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0,
    "base_model_name_or_path": "somewhere", "inference_mode": True, "task_type": "CAUSAL_LM",
}  # fmt: skip


def weights() -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    return {f"layer.{i}": torch.randn(3, 4, generator=source) for i in range(5)}


def model(directory: Path, tensors: dict[str, torch.Tensor] | None = None, config: dict[str, Any] = CONFIG) -> Path:
    directory.mkdir()
    save_file(tensors or weights(), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def adapter(directory: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    directory.mkdir()
    save_file(tensors or weights(), directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({**ADAPTER, **changes}))
    return directory


def test_weights_digest_is_blake3_of_sorted_tensors_and_config(tmp_path: Path) -> None:
    tensors = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor([[3]], dtype=torch.int8)}
    entries = [
        ["a", "I8", [1, 1], blake3(b"\x03").hexdigest()[:32]],
        ["b", "F32", [2], blake3(struct.pack("<2f", 1.0, 2.0)).hexdigest()[:32]],
    ]
    expected = blake3(canonical_json([entries, CONFIG]).encode()).hexdigest()[:32]
    assert fingerprint.weights_digest(model(tmp_path / "m", tensors)) == expected


def test_other_shards_have_the_same_digest(tmp_path: Path) -> None:
    one = model(tmp_path / "one")
    many = model(tmp_path / "many")
    tensors = load_file(many / "model.safetensors")
    (many / "model.safetensors").unlink()
    for number, names in enumerate((["layer.3"], ["layer.0", "layer.4"], ["layer.2", "layer.1"]), start=1):
        part = {name: tensors[name] for name in names}
        save_file(part, many / f"model-{number:05d}-of-00003.safetensors", metadata={"format": "pt"})
    assert fingerprint.weights_digest(one) == fingerprint.weights_digest(many)


def test_real_shards_of_save_pretrained_have_the_same_digest(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM  # noqa: PLC0415  (only this test needs it)

    loaded = LlamaForCausalLM.from_pretrained(tiny_model)
    loaded.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    assert fingerprint.weights_digest(tmp_path / "sharded") == fingerprint.weights_digest(tiny_model)


def test_a_move_and_another_library_version_change_nothing(tmp_path: Path) -> None:
    base = fingerprint.weights_digest(model(tmp_path / "a"))
    noise = {
        "_name_or_path": "x",
        "transformers_version": "9",
        "dtype": "float16",
        "torch_dtype": "f",
        "use_cache": False,
    }
    assert fingerprint.weights_digest(model(tmp_path / "b", config={**noise, **CONFIG})) == base


@settings(deadline=None, max_examples=20)
@given(name=st.sampled_from(sorted(weights())), place=st.integers(min_value=0, max_value=11))
def test_one_other_value_changes_the_digest(tmp_path_factory: pytest.TempPathFactory, name: str, place: int) -> None:
    folder = tmp_path_factory.mktemp("models")
    changed = weights()
    changed[name].view(-1)[place] = torch.nextafter(changed[name].view(-1)[place], torch.tensor(9.0))
    assert fingerprint.weights_digest(model(folder / "a")) != fingerprint.weights_digest(model(folder / "b", changed))


def renamed() -> dict[str, torch.Tensor]:
    tensors = weights()
    tensors["layer.9"] = tensors.pop("layer.0")
    return tensors


def swapped() -> dict[str, torch.Tensor]:
    tensors = weights()
    return {**tensors, "layer.0": tensors["layer.1"].clone(), "layer.1": tensors["layer.0"].clone()}


OTHER_TENSORS = {
    "another name": renamed(),
    "two tensors swapped": swapped(),
    "another shape": {**weights(), "layer.0": weights()["layer.0"].reshape(4, 3)},
    "the same bytes as another dtype": {**weights(), "layer.0": weights()["layer.0"].view(torch.int32)},
    "one tensor less": {k: v for k, v in weights().items() if k != "layer.4"},
}


@pytest.mark.parametrize("case", OTHER_TENSORS)
def test_other_tensors_have_another_digest(tmp_path: Path, case: str) -> None:
    changed = model(tmp_path / "b", OTHER_TENSORS[case])
    assert fingerprint.weights_digest(model(tmp_path / "a")) != fingerprint.weights_digest(changed)


@pytest.mark.parametrize(
    "change", [{"rope_theta": 500000.0}, {"rms_norm_eps": 1e-6}, {"tie_word_embeddings": True}, {"hidden_act": "gelu"}]
)
def test_a_config_field_that_matters_changes_the_digest(tmp_path: Path, change: dict[str, Any]) -> None:
    other = model(tmp_path / "b", config={**CONFIG, **change})
    assert fingerprint.weights_digest(model(tmp_path / "a")) != fingerprint.weights_digest(other)


@pytest.mark.parametrize(
    "change",
    [
        {"base_model_name_or_path": "/elsewhere"},
        {"lora_dropout": 0.1},
        {"inference_mode": False},
        {"peft_version": "99"},
        {"revision": "main"},
        {"task_type": None},
        {"target_modules": ["v_proj", "q_proj"]},
    ],
)
def test_adapter_settings_that_change_nothing(tmp_path: Path, change: dict[str, Any]) -> None:
    other = adapter(tmp_path / "b", **change)
    assert fingerprint.adapter_digest(adapter(tmp_path / "a")) == fingerprint.adapter_digest(other)


@pytest.mark.parametrize(
    "change", [{"lora_alpha": 16}, {"use_rslora": True}, {"target_modules": ["q_proj"]}, {"alpha_pattern": {"q": 2}}]
)
def test_adapter_settings_that_change_the_result(tmp_path: Path, change: dict[str, Any]) -> None:
    other = adapter(tmp_path / "b", **change)
    assert fingerprint.adapter_digest(adapter(tmp_path / "a")) != fingerprint.adapter_digest(other)


def test_other_adapter_weights_have_another_digest(tmp_path: Path) -> None:
    other = adapter(tmp_path / "b", {k: v + 1 for k, v in weights().items()})
    assert fingerprint.adapter_digest(adapter(tmp_path / "a")) != fingerprint.adapter_digest(other)


def test_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MissingInputError, match=r"has no weights \(model\*\.safetensors\)"):
        fingerprint.weights_digest(tmp_path)
    with pytest.raises(MissingInputError, match=r"no adapter_config\.json"):
        fingerprint.adapter_digest(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(MissingInputError, match=r"adapter_model\.safetensors"):
        fingerprint.adapter_digest(tmp_path)


def test_a_truncated_file_is_damaged(tmp_path: Path) -> None:
    directory = model(tmp_path / "m")
    path = directory / "model.safetensors"
    content = path.read_bytes()
    for size in (0, 4, 8, 100, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match=r"model\.safetensors is damaged"):
            fingerprint.weights_digest(directory)


def test_a_flipped_bit_is_another_digest_or_a_named_damage(tmp_path: Path) -> None:
    directory = model(tmp_path / "m")
    path = directory / "model.safetensors"
    intact = path.read_bytes()
    expected = fingerprint.weights_digest(directory)

    @settings(deadline=None, max_examples=150)
    @given(position=st.integers(min_value=0, max_value=len(intact) - 1), bit=st.integers(min_value=0, max_value=7))
    def check(position: int, bit: int) -> None:
        damaged = bytearray(intact)
        damaged[position] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            found = fingerprint.weights_digest(directory)
        except DataError as error:
            found = error.message
        assert found != expected
        assert len(found) == len(expected) or str(path) in found

    check()


@pytest.mark.parametrize("text", ["{", "[]"])
@pytest.mark.parametrize("kind", ["config.json", "adapter_config.json"])
def test_a_damaged_settings_file_is_named(tmp_path: Path, kind: str, text: str) -> None:
    directory = adapter(tmp_path / "m") if kind == "adapter_config.json" else model(tmp_path / "m")
    (directory / kind).write_bytes(text.encode("latin-1"))
    digest = {
        "config.json": fingerprint.weights_digest,
        "adapter_config.json": fingerprint.adapter_digest,
    }[kind]
    with pytest.raises(DataError, match=kind):
        digest(directory)


def test_large_tensors_are_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = model(tmp_path / "m")
    whole = fingerprint.weights_digest(directory)
    monkeypatch.setattr(fingerprint, "_CHUNK", 7)
    assert fingerprint.weights_digest(directory) == whole


def test_tokenizer_digest_ignores_padding_truncation_and_key_order() -> None:
    def digest(text: str) -> str:
        return fingerprint.tokenizer_digest(json.loads(text))

    plain = digest('{"model": {"vocab": {"a": 0, "b": 1}}, "padding": null, "truncation": null}')
    assert digest('{"padding": {"length": 8}, "truncation": {"max": 9}, "model": {"vocab": {"b": 1, "a": 0}}}') == plain
    assert digest('{"model": {"vocab": {"a": 1, "b": 0}}, "padding": null, "truncation": null}') != plain


def test_policy_ids_name_their_parts() -> None:
    assert fingerprint.policy_id("aa", None) == "weights:aa"
    assert fingerprint.policy_id("aa", "bb") == "weights:aa+adapter:bb"


def test_text_digest_is_blake3() -> None:
    assert fingerprint.text_digest("{{ x }}") == blake3(b"{{ x }}").hexdigest()[:32]


def test_an_adapter_of_experts_has_one_identity_in_any_order_of_its_sets(tmp_path: Path) -> None:
    directory = adapter(tmp_path / "a")
    path = directory / "adapter_config.json"
    settings = json.loads(path.read_text())
    digests: set[str] = set()
    for order in (["experts.up", "experts.down"], ["experts.down", "experts.up"]):
        path.write_text(json.dumps({**settings, "target_parameters": order}))
        digests.add(fingerprint.adapter_digest(directory))
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b'"F32"', b'"F99"', "unknown dtype 'F99'"),
        (b'"F32"', b'"F64"', "bytes, not those of"),
        (b'"shape":[', b'"shape":{', "damaged"),
    ],
)
def test_a_header_that_does_not_fit_its_bytes(tmp_path: Path, old: bytes, new: bytes, words: str) -> None:
    directory = model(tmp_path / "m")
    path = next(directory.glob("*.safetensors"))
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    with pytest.raises(DataError, match=words):
        fingerprint.weights_digest(directory)


@pytest.mark.parametrize(
    ("folder", "hint"), [("adapter", "{}/adapter as --adapter"), ("model", "give {}/model"), ("", "safetensors only")]
)
def test_a_run_in_place_of_a_model_is_told_where_its_policy_is(tmp_path: Path, folder: str, hint: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / folder).mkdir(exist_ok=True)
    with pytest.raises(MissingInputError, match="has no weights") as caught:
        fingerprint.weights_digest(tmp_path)
    assert hint.format(tmp_path) in caught.value.hint
