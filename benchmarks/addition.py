"""A task with a verifier that two cores learn in seconds: `37+5=` is answered by `42`, character by character.

A Llama of 47,000 weights is taught 600 of the 900 sums until it samples about half of the answers right. 400 of these
are prompts to train on, 200 are for the choice of settings (`validation`), and the 300 others are held out. A model
directory, a prompts file and a reward, for the commands of prefpipe.
"""

import json
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

CHARACTERS = "0123456789+="
END, PAD = "<end>", "<pad>"
SUMS = tuple((a, b) for a in range(10, 100) for b in range(10))
SPLITS = {"train": 400, "validation": 200, "heldout": 300}  # the first two are taught
_BATCH, _RATE, _WARMUP = 64, 4e-3, 20
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


def write_prompts(path: Path) -> Path:
    """Write every sum as a prompt with its answer and its split."""
    lines = [
        {"messages": [{"role": "user", "content": question(s)}], "answer": str(sum(s)), "split": name}
        for name, sums in split().items()
        for s in sums
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def closeness(completions: Sequence[list[dict[str, str]]], answer: Sequence[str], **_columns: object) -> list[float]:
    """A reward in tenths: 1 for the right number, 0.1 less for each unit that it is off, never below 0."""
    return [_close(c[-1]["content"], right) for c, right in zip(completions, answer, strict=True)]


def teach(directory: Path, seed: int, steps: int) -> Path:
    """Write a model that has learnt sums by cross entropy, unless it is there: weights and batches follow `seed`."""
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
    adamw = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step, (prompts, answers) in enumerate(_batches(seed, steps)):
        adamw.param_groups[0]["lr"] = _RATE * min(1, (step + 1) / _WARMUP)
        width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        tokens = torch.tensor(
            [p + a + [pad] * (width - len(p) - len(a)) for p, a in zip(prompts, answers, strict=True)]
        )
        targets = tokens.masked_fill(tokens == pad, -100)
        targets[:, : len(prompts[0])] = -100  # every prompt has five characters
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


def _batches(seed: int, steps: int) -> Iterator[tuple[list[list[int]], list[list[int]]]]:
    source, splits = random.Random(seed + 1), split()
    sums = splits["train"] + splits["validation"]
    for _ in range(steps):
        batch = source.choices(sums, k=_BATCH)
        yield (
            [list(map(CHARACTERS.index, question(s))) for s in batch],
            [[*map(CHARACTERS.index, str(sum(s))), len(CHARACTERS)] for s in batch],
        )


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
