"""A tokenizer that is larger than the embedding of its model is refused when it is loaded, and the model is blamed."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from prefpipe.errors import DataError
from prefpipe.models import embedding
from prefpipe.models.chat import load_chat
from tests.conftest import Call, Write

ENDS = frozenset({2})


def with_token(tiny_model: Path, directory: Path, text: str, *, special: bool) -> Path:
    """The tiny model (264 tokens, of which its tokenizer has 259) with tokens 259 to 263 and one more, 264."""
    shutil.copytree(tiny_model, directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(f"<|{n}|>", special=True) for n in range(259, 264)])
    add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
    add([AddedToken(text, special=special)])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def test_a_tokenizer_with_more_tokens_than_the_model(
    tiny_model: Path, tmp_path: Path, write: Write, call: Call
) -> None:
    """Text may hold an ordinary token; a special one must be written by the template, or end a completion."""
    load_chat(with_token(tiny_model, tmp_path / "image", "<image>", special=True))
    model = with_token(tiny_model, tmp_path / "word", "kettle", special=False)
    done = call("train", "--model", model, "--pairs", write({"prompt": "a", "chosen": "b", "rejected": "c"}),
                "--dtype", "float32", "--out", tmp_path / "out")  # fmt: skip
    assert done.code == 65
    assert "the model has 264 tokens, its tokenizer 1 more (first 'kettle', id 264)" in done.stderr
    assert "row" not in done.stderr
    tokenizer = Tokenizer.from_file(str(tmp_path / "image" / "tokenizer.json"))
    embedding.check(tmp_path / "image", tokenizer, "{{ '<|im_end|>' }}", ENDS)
    for template, ends in (("{{ '<image>' }}", ENDS), ("", {2, 264})):
        with pytest.raises(DataError, match="<image>"):
            embedding.check(tmp_path / "image", tokenizer, template, ends)


def test_the_size_of_an_embedding(tmp_path: Path) -> None:
    assert embedding.size(tmp_path) is None
    for config, size in (({}, None), ({"vocab_size": 7}, 7), ({"text_config": {"vocab_size": 9}, "vocab_size": 7}, 9)):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert embedding.size(tmp_path) == size
