"""The name of a vocabulary: every id with its token, and nothing else of a tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from prefpipe.config.generate import GenerateConfig
from prefpipe.errors import DataError, IdentityError
from prefpipe.models import vocabulary
from prefpipe.runs import store

TOKENS = {"a": 0, "b": 1, "ab": 2}


def model(directory: Path, vocab: Any, added: dict[str, int] | None = None, **rest: Any) -> Path:
    """A directory with a tokenizer of this vocabulary, and nothing else."""
    directory.mkdir(parents=True, exist_ok=True)
    kind = models.BPE(vocab=vocab, merges=[]) if isinstance(vocab, dict) else models.Unigram(vocab, 0)
    written = json.loads(Tokenizer(kind).to_str())
    plain = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    written["added_tokens"] = [{"id": i, "content": token} | plain for token, i in (added or {}).items()]
    (directory / "tokenizer.json").write_text(json.dumps(written | rest))
    return directory


def run(out: Path, *names: str) -> Path:
    with store.open_run(out, "generate", GenerateConfig(), {"of": str(names)}, force=False) as made:
        made.finish({}, vocabulary.record(names) if names else {})
    return out


def test_all_tokens_of_a_real_tokenizer_are_read(tiny_model: Path):
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    assert vocabulary.read(tiny_model) == sorted((number, token) for token, number in tokenizer.get_vocab().items())
    assert vocabulary.read(tiny_model) == vocabulary.of_tokenizer(tokenizer)
    assert vocabulary.name(vocabulary.read(tiny_model)).startswith(f"{tokenizer.get_vocab_size()}:")


def test_the_list_of_a_unigram_model_counts_its_pieces(tmp_path: Path):
    pieces = model(tmp_path / "u", [("a", -1.0), ("b", -2.5), ("ab", -3.0)])
    assert vocabulary.read(pieces) == vocabulary.read(model(tmp_path / "b", TOKENS)) == [(0, "a"), (1, "b"), (2, "ab")]
    vocabulary.check([run(tmp_path / "r", vocabulary.name(vocabulary.read(pieces)))], model(tmp_path / "b", TOKENS))


@given(st.permutations(sorted(TOKENS)))
def test_only_the_pairs_of_id_and_token_count(order: list[str]):
    """The order in the file does not; two tokens that change places do."""
    pairs = sorted((TOKENS[token], token) for token in order)
    swapped = sorted((number, {"a": "b", "b": "a"}.get(token, token)) for number, token in pairs)
    assert vocabulary.name(pairs) == vocabulary.name([(0, "a"), (1, "b"), (2, "ab")]) != vocabulary.name(swapped)


def test_a_model_with_more_tokens_still_has_the_old_ones(tmp_path: Path):
    old, more = (vocabulary.read(model(tmp_path / n, TOKENS, a)) for n, a in (("old", {}), ("more", {"<pad>": 3})))
    assert vocabulary.name(more, 3) == vocabulary.name(old)
    assert vocabulary.name(more) != vocabulary.name(old) == vocabulary.name(old, 4)


def test_a_run_is_checked_against_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    made = model(tmp_path / "m", TOKENS)
    own = vocabulary.name(vocabulary.read(made))
    runs = [run(tmp_path / "r", own), run(tmp_path / "silent")]
    vocabulary.check(runs, made)
    vocabulary.check(runs, model(tmp_path / "more", TOKENS, {"<pad>": 3}, normalizer={"type": "NFC"}))
    for name, others in (("swapped", {"b": 0, "a": 1, "ab": 2}), ("fewer", {"a": 0, "b": 1})):
        with pytest.raises(IdentityError, match=f"r was made with another tokenizer.*tokenizer: {own} there") as caught:
            vocabulary.check(runs, model(tmp_path / name, others))
        assert vocabulary.name(vocabulary.read(tmp_path / name)) in caught.value.message
    capsys.readouterr()
    vocabulary.check(runs[1:], tmp_path)  # nothing to check: nothing is said
    assert capsys.readouterr().err == ""
    vocabulary.check(runs, tmp_path)
    assert "has no tokenizer" in capsys.readouterr().err


def test_tokens_that_stand_beside_tokenizer_json_count(tmp_path: Path):
    """The settings name a token that tokenizer.json lacks, so that transformers adds it. Runs that were named without
    it are the model's all the same, and so are those of a copy whose tokenizer.json has it."""
    made = model(tmp_path / "m", TOKENS)
    bare = vocabulary.name(vocabulary.read(made))
    (made / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>"}))
    whole = vocabulary.read(made)
    assert whole == [(0, "a"), (1, "b"), (2, "ab"), (3, "<pad>")]
    vocabulary.check([run(tmp_path / "old", bare), run(tmp_path / "new", vocabulary.name(whole))], made)
    vocabulary.check([tmp_path / "new"], model(tmp_path / "copy", TOKENS, {"<pad>": 3}))
    with pytest.raises(IdentityError, match="the same id is another token"):
        vocabulary.check([tmp_path / "new"], model(tmp_path / "other", TOKENS, {"<end>": 3}))


def test_a_model_without_tokenizer_json_has_a_vocabulary(tmp_path: Path):
    """GPT-2's older files, of which transformers builds the tokenizer."""
    words = {token: i for i, token in enumerate(["<|endoftext|>", "a", "b", "ab"])}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    tokens = vocabulary.read(tmp_path)
    assert tokens == [(0, "<|endoftext|>"), (1, "a"), (2, "b"), (3, "ab")]
    vocabulary.check([run(tmp_path / "r", vocabulary.name(tokens))], tmp_path)
    with pytest.raises(IdentityError, match="the same id is another token"):
        vocabulary.check([run(tmp_path / "s", vocabulary.name([(0, "b")]))], tmp_path)


def test_runs_hand_on_what_they_read_and_files_are_of_the_model(tmp_path: Path):
    tokenizer = Tokenizer(models.BPE(vocab=TOKENS, merges=[]))
    sources = [str(run(tmp_path / "a", "3:x", "2:y")), str(run(tmp_path / "b"))]
    assert sorted(vocabulary.of_sources(sources, tokenizer)) == ["2:y", "3:x"]
    own = vocabulary.name(vocabulary.of_tokenizer(tokenizer))
    assert sorted(vocabulary.of_sources([*sources, "file.jsonl"], tokenizer)) == sorted(["2:y", "3:x", own])
    assert vocabulary.record(["b", "a", "b"]) == {"vocabularies": ["a", "b"]}


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {"vocab": 3}}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        vocabulary.check([run(tmp_path / "r", "1:x")], tmp_path)
