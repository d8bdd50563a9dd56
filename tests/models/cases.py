"""Conversations of every shape, and tokenizers of every kind."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from prefpipe.schemas import Message

USER = Message(role="user", content="Name a bird.")
SHAPES = {
    "one turn": [USER],
    "system first": [Message(role="system", content="Be brief."), USER],
    "multi-turn": [USER, Message(role="assistant", content="The owl."), Message(role="user", content="Another?")],
    "white space": [Message(role="user", content="  two\n\nlines\t ")],
    "not ASCII": [Message(role="user", content="Où est l'été? 日本 🦉 e\u0301")],
    "ends with the answer": [USER, Message(role="assistant", content="The owl.")],
}

END = "<|end|>"
LETTERS = [*(chr(i) for i in range(33, 127))]


def finish(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return tokenizer


def legacy() -> Tokenizer:
    """A space in front of every piece of text, as in Llama 2."""
    vocabulary = ["<unk>", "▁", *LETTERS, *(f"<0x{i:02X}>" for i in range(256))]
    bpe = models.BPE({t: i for i, t in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return finish(tokenizer)


def lower() -> Tokenizer:
    """Lower case, words apart, as in BERT."""
    letters = [*LETTERS, *(f"##{letter}" for letter in LETTERS)]
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(["[UNK]", *letters])}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return finish(tokenizer)


def pieces() -> Tokenizer:
    """Words begin with a mark, unknown characters are lost, as in T5."""
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -2.0), *((t, -3.0) for t in LETTERS)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return finish(tokenizer)


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return finish(tokenizer)
