"""Rewards from a sequence-classification model, with the tokenizer and chat template of that model."""

import contextlib
import functools
import json
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from prefpipe import log, machine
from prefpipe.config.base import suggestion
from prefpipe.config.rewards import RewardModel
from prefpipe.engines import pooling
from prefpipe.errors import RowFault, UsageError
from prefpipe.forward.architecture import check_architecture
from prefpipe.forward.weights import read_model
from prefpipe.models import fingerprint
from prefpipe.models.chat import Chat, load_chat
from prefpipe.models.encoding import DROP, Rules, encode_rendered, rendered
from prefpipe.models.policy import context_length, resolve
from prefpipe.rewards.base import Answer, RewardFunction, Scored
from prefpipe.schemas import Message

VERSION = 1  # raise it when the reward can change: a run never mixes two versions
Logits = dict[int, list[float]]  # index of a row -> one number per label


@dataclass(frozen=True)
class Row:
    """A conversation that the model can rate: its position in the list of answers, and its token ids."""

    index: int
    token_ids: list[int]


def inputs(settings: RewardModel) -> dict[str, str]:
    """Digests of weights, tokenizer and chat template."""
    policy = resolve(_name(settings))
    chat = load_chat(policy.directory, settings.chat_template, generates=False)
    frame = {"frame": json.dumps(_frame(chat))} if any(_frame(chat)) else {}
    return {"model": policy.id, **chat.digests, **frame}


def reward_model(settings: RewardModel) -> RewardFunction:
    """The raw logit of the model, without a sigmoid, for prompt and completion as its chat template renders them.

    Rows are batched by length within `tokens_per_batch`; the batching changes a reward by float noise only. No reward,
    status unparsable: the template refuses the conversation, or it spells a control token or is longer than
    `max_length`. No reward, status crash: the logit is no finite number. The weights load at the first call.
    """
    directory = resolve(_name(settings)).directory
    chat = load_chat(directory, settings.chat_template, generates=False)
    label = find_label(directory, settings.label)
    longest = min(settings.max_length, context_length(directory) or settings.max_length)
    rules = Rules.of(settings)
    started = contextlib.ExitStack()
    logits_of = functools.cache(lambda: started.enter_context(_classifier(settings, directory, longest)))

    def rate(answers: Sequence[Answer]) -> list[Scored]:
        scores: dict[int, Scored] = {}
        rows: list[Row] = []
        for index, answer in enumerate(answers):
            try:
                rows.append(Row(index, tokenise(chat, answer, longest, rules)))
            except RowFault as fault:
                scores[index] = Scored(None, "unparsable", f"{fault.reason}: {fault.detail}")
        if rows:
            logits_by_index = logits_of()(rows)
            scores |= {row.index: _scored(logits_by_index[row.index][label]) for row in rows}
        return [scores[index] for index in range(len(answers))]

    weakref.finalize(rate, started.close)
    return rate


@contextlib.contextmanager
def _classifier(settings: RewardModel, directory: Path, longest: int) -> Generator[Callable[[list[Row]], Logits]]:
    """A function from rows to the logits of each, by the index of the row."""
    dtype = machine.named(settings.dtype)
    if settings.engine == "vllm":
        check_architecture(directory, AutoModelForSequenceClassification)
        _check_classifier(directory)  # vLLM would make a classifier of any language model
        log.info(f"starting vLLM for reward model {directory.name} ({dtype})")
        pad_token_id = fingerprint.read_json(directory / "config.json").get("pad_token_id")
        with pooling.classifier(directory, dtype, longest, settings.gpu_memory_utilization) as classify:

            def at_once(rows: list[Row]) -> Logits:
                values = classify([without_padding(pad_token_id, row.token_ids) for row in rows])
                return {row.index: value for row, value in zip(rows, values, strict=True)}

            yield at_once
        return
    model = load(directory, dtype)

    def by_batch(rows: list[Row]) -> Logits:
        by_index: Logits = {}
        for batch in batches(rows, settings.tokens_per_batch):
            values = logits(model, [row.token_ids for row in batch]).tolist()
            by_index |= {row.index: value for row, value in zip(batch, values, strict=True)}
        return by_index

    yield by_batch


def _check_classifier(directory: Path) -> None:
    names = fingerprint.read_json(directory / "config.json").get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in names):
        raise UsageError(
            f"reward model {directory} is {', '.join(names) or 'of no known architecture'}",
            "give a model trained for sequence classification, not a language model",
        )


def tokenise(chat: Chat, answer: Answer, max_length: int, rules: Rules = DROP) -> list[int]:
    """Token ids of prompt and completion, by the tokenizer of the reward model. Raises RowFault when it cannot rate
    them."""
    messages = [*answer.messages, Message(role="assistant", content=answer.text)]
    ids = encode_rendered(chat, rendered(chat, messages, answer.template_inputs, rules, add_generation_prompt=False))
    if not ids:
        raise RowFault("empty", "the chat template renders nothing")
    before, behind = _frame(chat)
    ids = [*(before if ids[: len(before)] != before else []), *ids, *(behind if ids[-len(behind) :] != behind else [])]
    if len(ids) > max_length:
        raise RowFault("too_long", f"{len(ids)} tokens, max_length is {max_length}")
    return ids


def _frame(chat: Chat) -> tuple[list[int], list[int]]:
    """The tokens in front of and behind every text of an encoder ([CLS] and [SEP]), which its tokenizer adds where a
    template leaves them out. None for a decoder: its tokenizer names no [CLS]."""
    if "cls_token" not in chat.named_tokens:
        return [], []
    probe = chat.tokenizer.encode("a", add_special_tokens=True)
    before, behind = (
        [token for token, _ in takewhile(lambda pair: pair[1], pairs)]
        for pairs in (
            zip(probe.ids, probe.special_tokens_mask, strict=True),
            zip(reversed(probe.ids), reversed(probe.special_tokens_mask), strict=True),
        )
    )
    return before, behind[::-1]


def batches(rows: Sequence[Row], tokens_per_batch: int) -> Iterator[list[Row]]:
    """Rows by length, longest first (so that the largest batch comes first), as many as fit with their padding."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda r: (-len(r.token_ids), r.index)):
        if batch and (len(batch) + 1) * len(batch[0].token_ids) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def logits(model: Any, token_ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits [B, labels] in float32 of rows of token ids, padded on the right. Each row gets what it gets alone.

    transformers rates a row at its last token that is not the padding token, and refuses a batch when the model has no
    padding token. Then a token that no row holds takes its place, so that a row is rated at its very last token.
    """
    config = model.config.get_text_config()
    pad_token_id = config.pad_token_id
    filler = padding(pad_token_id, token_ids)
    longest = max(map(len, token_ids))
    ids = torch.tensor([[*row, *[filler] * (longest - len(row))] for row in token_ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in token_ids])
    config.pad_token_id = filler
    try:
        with torch.inference_mode():
            return model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits.float().cpu()
    finally:
        config.pad_token_id = pad_token_id  # the next batch may hold this filler as a token


def padding(pad_token_id: int | None, token_ids: Sequence[Sequence[int]]) -> int:
    """The padding token of the model, or the smallest token that no row holds."""
    if pad_token_id is not None:
        return pad_token_id
    used = {token for row in token_ids for token in row}
    return next(t for t in range(len(used) + 1) if t not in used)


def without_padding(pad_token_id: int | None, token_ids: Sequence[int]) -> Sequence[int]:
    """A row up to the token at which transformers rates it, since vLLM rates the very last token."""
    end = len(token_ids)
    while end > 1 and token_ids[end - 1] == pad_token_id:
        end -= 1
    return token_ids[:end]


def load(directory: Path, dtype: str) -> Any:
    """The model in eval mode, on the GPU when there is one. Raises what `read_model` raises."""
    log.info(f"loading reward model {directory.name} ({dtype})")
    model = read_model(AutoModelForSequenceClassification, directory, dtype)
    return model.requires_grad_(requires_grad=False).to("cuda" if torch.cuda.is_available() else "cpu").eval()


def find_label(directory: Path, label: str) -> int:
    """The index of the logit that is the reward. Raises UsageError when `label` names none of several labels."""
    config = fingerprint.read_json(directory / "config.json")
    names = {int(k): str(v) for k, v in config.get("id2label", {}).items()} or dict(
        enumerate(f"LABEL_{i}" for i in range(config.get("num_labels", 2)))
    )
    if not label and len(names) == 1:
        return 0
    matching = [i for i, name in names.items() if label in (name, str(i))]
    if len(matching) != 1:
        raise UsageError(
            f"label = '{label}' is none of the {len(names)} labels of {directory}"
            f"{suggestion(label, list(names.values()))}",
            f"set label to one of {', '.join(names.values())}",
        )
    return matching[0]


def _name(settings: RewardModel) -> str:
    if not settings.model:
        raise UsageError(
            "reward_model has no model", 'set it: [reward_settings.NAME] with kind = "reward_model" and model = "..."'
        )
    return settings.model


def _scored(value: float) -> Scored:
    if value != value or value in (float("inf"), float("-inf")):
        return Scored(None, "crash", f"the logit is {value}")
    return Scored(value)
