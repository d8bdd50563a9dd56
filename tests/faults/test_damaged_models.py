"""Damage any file of a model or an adapter, or put another value into its JSON: it works, or one error names it.

A sample of the changes by default, all of them with PREFPIPE_ALL_FAULTS=1 (`make faults`).
"""

import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from prefpipe.errors import PrefpipeError
from prefpipe.forward import load
from prefpipe.models import policy, vocabulary
from prefpipe.models.chat import load_chat
from tests.conftest import Call, Write
from tests.faults.damaged_models import changes, damaged
from tests.tiny import make_adapter

EVERY = 1 if "PREFPIPE_ALL_FAULTS" in os.environ else 25
REFUSED = (2, 65, 66, 76)


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model in one file, the same in parts with an index and files of a processor, and an adapter."""
    top = tmp_path_factory.mktemp("whole")
    shutil.copytree(tiny_model, top / "parts")
    LlamaForCausalLM.from_pretrained(tiny_model).save_pretrained(top / "parts", max_shard_size="100KB")
    (top / "parts" / "model.safetensors").unlink()
    for name in ("preprocessor_config.json", "processor_config.json", "special_tokens_map.json"):
        (top / "parts" / name).write_text('{"pad_token": "<|endoftext|>", "processor_class": "LlavaProcessor"}')
    return {"one": tiny_model, "parts": top / "parts", "adapter": make_adapter(tiny_model, top / "adapter", 0)}


def use(model: Path, adapter: Path | None) -> None:
    """What `score` and `train` do with the files of a model before they read a row, and one step of it."""
    found = policy.resolve(str(model), str(adapter or "none"))
    policy.context_length(found.directory)
    load_chat(found.directory)
    list(vocabulary._listings(found.directory))
    loaded: torch.nn.Module = load.load_model(found.directory, "float32", device="cpu")
    if found.adapter is not None:
        loaded = load.load_adapter(loaded, found.adapter, trainable=True)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        loaded(input_ids=torch.tensor([[5, 6, 7]]))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # all changes to the model in parts took 274 s of a busy machine
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["one", "parts", "adapter"])
def test_a_change_is_refused_with_the_name_of_its_folder_or_does_no_harm(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    wrong: list[str] = []
    refused = 0
    for name, change in list(changes(folders[kind]))[::EVERY]:
        into = damaged(folders[kind], tmp_path / "damaged", change)
        policy._memoised_digest.cache_clear()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                use(folders["one"], into) if kind == "adapter" else use(into, None)
        except PrefpipeError as error:
            refused += 1
            if str(into) not in error.message or error.exit_code not in REFUSED or not error.hint:
                wrong.append(f"{name}: {error.exit_code} {error.message}")
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
    assert refused
    assert not wrong, "\n".join(wrong)


COMMANDS = [
    ("one", "config.json: null"), ("one", "tokenizer.json: a third"), ("one", "chat_template.jinja: a third"),
    ("one", "generation_config.json: deep"), ("one", "model.safetensors: a directory"), ("one", "config.json: gone"),
    ("parts", "model.safetensors.index.json: a list"), ("parts", "model.safetensors.index.json: a third"),
    ("one", "config.json: num_hidden_layers is a huge number"), ("one", "tokenizer_config.json: a number"),
    ("adapter", "adapter_config.json: peft_type is a text"), ("adapter", "adapter_config.json: deep"),
    ("adapter", "adapter_config.json: alpha_pattern is null"), ("adapter", "adapter_model.safetensors: a third"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "name"), COMMANDS)
@pytest.mark.parametrize("command", ["score", "train"])
def test_through_the_command_line_it_is_two_lines(
    folders: dict[str, Path], tmp_path: Path, write: Write, call: Call, command: str, kind: str, name: str
) -> None:
    into = damaged(folders[kind], tmp_path / "damaged", dict(changes(folders[kind]))[name])
    rows = write({"prompt": "a", "chosen": "b", "rejected": "c"})
    where = {"score": ["--inputs", rows, "--engine", "fake", "--check", "0"], "train": ["--pairs", rows]}[command]
    model = ["--model", folders["one"], "--adapter", into] if kind == "adapter" else ["--model", into]
    done = call(command, *model, *where, "--dtype", "float32", "--out", tmp_path / "out")
    if command == "score" and done.code == 0:
        return  # the fake engine reads no weights and no adapter: only their digests
    assert done.code in REFUSED, done.stderr
    assert str(into) in done.stderr
    assert [line.partition(":")[0] for line in done.stderr.splitlines()][-2:] == ["error", "hint"]
    assert "error: unexpected" not in done.stderr
