"""A task with a verifier that two cores learn in seconds: `37+5=` is answered by `42`, character by character.

A Llama of 47,000 weights is taught 600 of the 900 sums, until a share of the answers that it would sample is right.
400 of these are prompts to train on, 200 are for the choice of settings (`validation`), and the 300 others are held
out. A model directory, a prompts file and a reward, for the commands of prefpipe.
"""

import json
import random
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

CHARACTERS = "0123456789+="
END, PAD = "<end>", "<pad>"
SUMS = tuple((a, b) for a in range(10, 100) for b in range(10))
SPLITS = {"train": 400, "validation": 200, "heldout": 300}  # the first two are taught
_BATCH, _RATE, _WARMUP, _MOST_STEPS = 64, 4e-3, 20, 600
_PROMPT = 5  # characters of every prompt
_ZERO_AT = 10  # a number that is so far off has no reward
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def question(terms: tuple[int, int]) -> str:
    """The prompt of a sum."""
    return f"{terms[0]}+{terms[1]}="


def split() -> dict[str, list[tuple[int, int]]]:
    """The sums of each split, in random order, always the same."""
    shuffled = iter(random.Random(0).sample(SUMS, len(SUMS)))
    return {name: list(islice(shuffled, count)) for name, count in SPLITS.items()}


def write_prompts(path: Path, counts: Mapping[str, int]) -> Path:
    """Write the first sums of each split, so many of each, as prompts with their answer and split."""
    lines = [
        {"messages": [{"role": "user", "content": question(s)}], "answer": str(sum(s)), "split": name}
        for name, sums in split().items()
        for s in sums[: counts[name]]
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if not path.exists() or path.read_text() != text:  # another experiment may read it
        path.write_text(text)
    return path


def closeness(completions: Sequence[list[dict[str, str]]], answer: Sequence[str], **_columns: object) -> list[float]:
    """A reward in tenths: 1 for the right number, 0.1 less for each unit that it is off, never below 0."""
    return [_close(c[-1]["content"], right) for c, right in zip(completions, answer, strict=True)]


def teach(directory: Path, seed: int, right: float) -> Path:
    """Write a model that has learnt sums by cross entropy, unless it is there: weights and batches follow `seed`. It is
    looked at every ten steps, and done when the mean probability of the right answer to a validation prompt is at least
    `right`: models of all seeds then start from about the same place."""
    if directory.exists():
        return directory
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    end, pad = len(CHARACTERS), len(CHARACTERS) + 1
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=pad + 1, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=32, tie_word_embeddings=True, bos_token_id=pad,
            eos_token_id=end, pad_token_id=pad,
        )
    )  # fmt: skip
    source, splits = random.Random(seed + 1), split()
    taught, looked_at = splits["train"] + splits["validation"], _rows(splits["validation"])
    adamw = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(_MOST_STEPS):
        if step % 10 == 0 and _probability(model, looked_at) >= right:
            break
        adamw.param_groups[0]["lr"] = _RATE * min(1, (step + 1) / _WARMUP)
        tokens = torch.tensor(_rows(source.choices(taught, k=_BATCH)))
        targets = tokens.masked_fill(tokens == pad, -100)
        targets[:, :_PROMPT] = -100
        model(input_ids=tokens, labels=targets).loss.backward()
        adamw.step()
        adamw.zero_grad()
    partial = directory.with_name(f"{directory.name}.partial")
    model.save_pretrained(partial)
    _write_tokenizer(partial)
    return partial.rename(directory)


def _close(said: str, right: str) -> float:
    is_number = said.isdecimal() and (said == "0" or said[0] != "0")
    return max(0, _ZERO_AT - abs(int(said) - int(right))) / _ZERO_AT if is_number else 0.0


def _rows(sums: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Prompts with their right answers as token ids, padded to the longest."""
    end, pad = len(CHARACTERS), len(CHARACTERS) + 1
    rows = [[*map(CHARACTERS.index, f"{question(s)}{sum(s)}"), end] for s in sums]
    return [row + [pad] * (max(map(len, rows)) - len(row)) for row in rows]


def _probability(model: Any, rows: list[list[int]]) -> float:
    """The mean probability of the answers, as whole sequences."""
    import torch

    tokens = torch.tensor(rows)
    with torch.no_grad():
        logps = model(input_ids=tokens).logits[:, _PROMPT - 1 : -1].log_softmax(-1)
    answers = tokens[:, _PROMPT:]
    of_tokens = logps.gather(-1, answers.unsqueeze(-1)).squeeze(-1).masked_fill(answers > len(CHARACTERS), 0.0)
    return of_tokens.sum(-1).exp().mean().item()


def _write_tokenizer(directory: Path) -> None:
    """One token per character, after which come the end and the padding."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*CHARACTERS, END, PAD])}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(END, special=True), AddedToken(PAD, special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": END, "pad_token": PAD, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    (directory / "chat_template.jinja").write_text(TEMPLATE)
