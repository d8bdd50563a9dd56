"""A tokenizer is what transformers builds of the files of a model; what it refuses is one sentence with a way out."""

import json
from pathlib import Path
from typing import Any

import pytest

from prefpipe.errors import DataError, MissingInputError, UsageError
from prefpipe.models import fingerprint
from prefpipe.models.tokenizer import load_tokenizer
from tests.tiny import SPECIAL

PAIR = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]


def change(path: Path, **values: Any) -> None:
    """Set values in a JSON file; None removes one."""
    old = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({k: v for k, v in (old | values).items() if v is not None}))


def test_switches_are_no_tokens(copy: Path) -> None:
    plain = load_tokenizer(copy)
    change(copy / "tokenizer_config.json", add_bos_token=False, add_eos_token=False)
    assert load_tokenizer(copy).named_tokens == plain.named_tokens


def test_names_may_stand_in_the_map_of_special_tokens_alone(copy: Path) -> None:
    change(copy / "tokenizer_config.json", bos_token=None, eos_token=None)
    change(copy / "special_tokens_map.json", bos_token="<|endoftext|>", eos_token="<|im_end|>")
    named = load_tokenizer(copy).named_tokens
    assert named == {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}


def around(before: str | None, behind: str | None) -> dict[str, Any]:
    """A step that puts tokens around every text."""
    parts = [{"SpecialToken": {"id": token, "type_id": 0}} if token else None for token in (before, behind)]
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {t: {"id": t, "ids": [SPECIAL.index(t)], "tokens": [t]} for t in (before, behind) if t}
    single = [part for part in (parts[0], text, parts[1]) if part]
    return {"type": "TemplateProcessing", "single": single, "pair": PAIR, "special_tokens": tokens}


@pytest.mark.parametrize(
    ("before", "behind"),
    [(None, None), ("<|im_start|>", None), (None, "<|im_end|>"), ("<|im_start|>", "<|im_end|>")],
)
def test_a_token_behind_a_text_does_not_open_it(copy: Path, before: str | None, behind: str | None) -> None:
    change(copy / "tokenizer.json", post_processor=around(before, behind))
    loaded = load_tokenizer(copy)
    assert (loaded.opening, loaded.closing) == (before or "", behind or "")


def test_ends_of_nested_and_of_default_configs_count(copy: Path) -> None:
    change(copy / "config.json", text_config={"eos_token_id": [5, 6]})
    assert load_tokenizer(copy).eos_token_ids == {2, 5, 6}
    change(copy / "config.json", eos_token_id=None, text_config=None)
    change(copy / "tokenizer_config.json", eos_token=None)
    (copy / "generation_config.json").unlink()
    assert load_tokenizer(copy).eos_token_ids == {2}  # what LlamaConfig has where config.json is silent


def test_the_digest_is_of_the_file_where_transformers_builds_just_that(copy: Path) -> None:
    of_file = fingerprint.tokenizer_digest(json.loads((copy / "tokenizer.json").read_text()))
    assert load_tokenizer(copy).digest == of_file
    change(copy / "tokenizer_config.json", extra_special_tokens=["<|tool|>"])
    assert load_tokenizer(copy).digest != of_file


def test_a_tokenizer_that_opens_texts_has_another_digest(copy: Path) -> None:
    plain = load_tokenizer(copy).digest
    change(copy / "tokenizer.json", post_processor=around("<|im_start|>", None))
    assert load_tokenizer(copy).digest != plain


def test_code_of_the_model_is_refused_and_never_runs(copy: Path) -> None:
    (copy / "tokenization_own.py").write_text("from pathlib import Path\nPath('ran').touch()\nclass Own: ...\n")
    change(
        copy / "tokenizer_config.json",
        tokenizer_class="Own",
        auto_map={"AutoTokenizer": ["tokenization_own.Own", None]},
    )
    change(copy / "config.json", model_type="own", auto_map={"AutoConfig": "configuration_own.Own"})
    with pytest.raises(UsageError, match="Python code that comes with the model") as caught:
        load_tokenizer(copy)
    assert "auto_map" in caught.value.hint
    assert not Path("ran").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"model": 3}'])
def test_a_damaged_tokenizer_is_one_error(copy: Path, text: str) -> None:
    (copy / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match="cannot load the tokenizer of"):
        load_tokenizer(copy)


def test_a_model_without_a_tokenizer_says_how_to_make_one(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(MissingInputError, match=r"has no tokenizer\.json") as caught:
        load_tokenizer(copy)
    assert "save_pretrained" in caught.value.hint
