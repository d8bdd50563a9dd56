"""Runnable stand-ins for the models of a corpus of metadata: their own small files, and a tokenizer."""

import itertools
import json
import lzma
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tests.conftest import ROOT

CORPUS = ROOT.parent / "shared" / "zoo" / "corpus"
_FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
_SPELLED = re.compile("<[|\uff5c][^<>\\s|\uff5c]{1,40}[|\uff5c]>|<(?:start|end)_of_turn>")


def every_name() -> list[str]:
    """The models of the corpus; none where there is no corpus."""
    return sorted(path.parent.name for path in CORPUS.glob("*/SOURCE.json"))


def names() -> list[str]:
    """Those that have a tokenizer."""
    return [name for name in every_name() if kind(name) != "none"]


def kind(name: str) -> str:
    """What the tokenizer of a model is: "real" (its own is in the corpus), "none" or the kind of a small one."""
    return _read(CORPUS / name / "SOURCE.json")["tokenizer"]


def stand_in(name: str, target: Path) -> Path:
    """The files of a model, with a tokenizer and without weights."""
    target.mkdir(parents=True)
    source = CORPUS / name
    for path in source.iterdir():
        if path.name == "tokenizer.json.xz":
            (target / "tokenizer.json").write_bytes(lzma.decompress(path.read_bytes()))
        elif path.name != "SOURCE.json":
            shutil.copyfile(path, target / path.name)
    if kind(name) != "real":
        _write_tokenizer(target, kind(name), _read(source / "SOURCE.json").get("ids", {}))
    elif "vocab_size" in (config := _read(target / "config.json")):  # some configs are of other models than tokenizers
        last = max(Tokenizer.from_file(str(target / "tokenizer.json")).get_vocab().values())
        _write(target / "config.json", config | {"vocab_size": max(config["vocab_size"], last + 1)})
    return target


def _write_tokenizer(directory: Path, kind_: str, unlisted: dict[str, int]) -> None:
    """A tokenizer of single bytes or letters with every added token of the model. The ids that its files name become
    those of this vocabulary."""
    added = _added_tokens(directory, unlisted)
    tokens = [added[number] for number in sorted(added)]
    tokenizer = (_letters if kind_ in ("spm", "gemma") else _bytes)(
        [t["content"] for t in tokens], spaced=kind_ == "spm"
    )
    for special, run in itertools.groupby(tokens, key=lambda token: token["special"]):
        ones = [AddedToken(**{key: token[key] for key in ("content", *_FLAGS)}) for token in run]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(ones)
    tokenizer.save(str(directory / "tokenizer.json"))
    ids = {number: tokenizer.token_to_id(token["content"]) for number, token in added.items()}
    settings = _read(directory / "tokenizer_config.json")
    if "added_tokens_decoder" in settings:
        listed = settings["added_tokens_decoder"]
        settings["added_tokens_decoder"] = {str(ids[int(number)]): token for number, token in listed.items()}
        _write(directory / "tokenizer_config.json", settings)
    listed = _read(directory / "added_tokens.json")
    if listed:
        _write(directory / "added_tokens.json", {token: tokenizer.token_to_id(token) for token in listed})
    for path in (directory / "config.json", directory / "generation_config.json"):
        if path.is_file():
            _write(path, _renumbered(_read(path), ids))


def _added_tokens(directory: Path, unlisted: dict[str, int]) -> dict[int, dict[str, Any]]:
    """Added tokens by their ids in the files; a token that only a name or the template spells gets the next id."""
    settings, shorter = _read(directory / "tokenizer_config.json"), _read(directory / "special_tokens_map.json")
    found = {int(number): _FLAGS | token for number, token in settings.get("added_tokens_decoder", {}).items()}
    known = {token["content"]: number for number, token in found.items()}
    template = directory / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else json.dumps(settings, ensure_ascii=False)
    configs = [_read(directory / f"{name}.json") for name in ("config", "generation_config")]
    named = {content: name for place in (shorter, settings) for name, content in _named(place)}
    wanted = [*unlisted, *_read(directory / "added_tokens.json"), *named, *sorted(set(_SPELLED.findall(text)))]
    listed = {**_read(directory / "added_tokens.json"), **unlisted}
    for content in dict.fromkeys(wanted):
        if content in known:
            continue
        ids = [i for config in configs for name, i in _token_ids(config) if name == f"{named.get(content)}_id"]
        number = listed.get(content, ids[0] if ids else None)
        if number is None or number in found:
            number = max([1_000_000, *found]) + 1
        special = content in named or bool(_SPELLED.fullmatch(content))
        found[number] = _FLAGS | {"content": content, "special": special}
        known[content] = number
    for number in {i for config in configs for _, i in _token_ids(config)} - set(found):
        found[number] = _FLAGS | {"content": f"<|unnamed_{number}|>"}
    return found


def _named(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, text) of named tokens in a file of settings, then those without a name."""
    for name, value in settings.items():
        if name.endswith("_token") and isinstance(value, str | dict) and value:
            yield name, value if isinstance(value, str) else value["content"]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        listed = settings.get(name) or []
        for value in listed if isinstance(listed, list) else listed.values():
            yield name, value if isinstance(value, str) else value["content"]


def _token_ids(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(value, dict):
        for key, inside in value.items():
            yield from _token_ids(inside, key)
    elif name.endswith(("token_id", "token_index")):
        yield from ((name, i) for i in (value if isinstance(value, list) else [value]) if isinstance(i, int) and i >= 0)


def _renumbered(value: Any, ids: dict[int, int], name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _renumbered(inside, ids, key) for key, inside in value.items()}
    if not name.endswith(("token_id", "token_index")):
        return value
    return [ids.get(i, i) for i in value] if isinstance(value, list) else ids.get(value, value)


def _bytes(first: list[str], *, spaced: bool) -> Tokenizer:
    assert not spaced
    vocabulary = dict.fromkeys([*first, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _letters(first: list[str], *, spaced: bool) -> Tokenizer:
    """Words begin with a mark in place of a space, the first one too where `spaced`; other characters become bytes."""
    letters = ["▁", *(chr(i) for i in range(33, 127)), *(f"<0x{i:02X}>" for i in range(256))]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(["<unk>", *first, *letters]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if spaced else replace
    ending = [decoders.Strip(" ", 1, 0)] if spaced else []
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ending]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
