"""Foreign formats become our rows: prompts for generate and evaluate, TRL-style preference files for train."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefpipe import store
from prefpipe.chat import Chat, RowFault, check_control_tokens, encode, encode_prompt, render
from prefpipe.errors import DataError, IdentityError, MissingInputError, UsageError
from prefpipe.ids import common_prefix, content_id, ids_digest
from prefpipe.schemas import Dropped, Label, Message, Messages, Pair, Prompt, RefLogps, from_table

_PROMPT_COLUMNS = ("messages", "prompt", "answer", "split", "source", "meta", "prompt_id")
_NO_LIMIT = 1 << 30


def read_prompts(path: Path, split: str, limit: int) -> tuple[list[Prompt], list[Dropped]]:
    """Prompts of a JSONL or Parquet file, the rows of `split` ("all" for every row), at most `limit` (0: no limit).

    A row has `messages` (list of role and content) or `prompt` (the same, or plain text as one user message). A
    repeated prompt goes to the ledger. Raises MissingInputError, or DataError naming file, line and field.
    """
    kept: dict[str, Prompt] = {}
    dropped: list[Dropped] = []
    splits: set[str] = set()
    for where, row in _rows(path):
        try:
            prompt = _to_prompt(row, where)
        except RowFault as fault:
            dropped.append(Dropped(where, fault.reason, fault.detail))
            continue
        splits.add(prompt.split)
        if split not in ("all", prompt.split):
            continue
        if prompt.prompt_id in kept:
            dropped.append(Dropped(prompt.prompt_id, "duplicate", f"{where} repeats an earlier prompt"))
        elif not limit or len(kept) < limit:
            kept[prompt.prompt_id] = prompt
    if not kept:
        raise DataError(
            f"{path} has no prompt with split '{split}' (splits there: {', '.join(sorted(splits)) or 'none'})",
            "choose one with --split, or 'all'",
        )
    return list(kept.values()), dropped


def read_pairs(path: Path, chat: Chat) -> tuple[list[Pair], list[Dropped]]:
    """Pairs of a TRL preference file (`prompt`, `chosen`, `rejected`; text or messages), tokenised once.

    The prompt is the common token prefix of the prompt alone and both renderings; what follows is the completion, with
    its end-of-sequence token exactly once and nothing after it. Faulty rows go to the ledger.
    """
    pairs: list[Pair] = []
    dropped: list[Dropped] = []
    for where, row in _rows(path):
        try:
            prompt, chosen, rejected = (
                _messages(_field(row, name, where), where, name, role)
                for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
            )
            pairs.append(_to_pair(chat, prompt, chosen, rejected))
        except RowFault as fault:
            dropped.append(Dropped(where, fault.reason, fault.detail))
    if not pairs:
        raise DataError(
            f"{path} has no usable pair ({len(dropped)} rows dropped)", "see the reasons in dropped.parquet"
        )
    return pairs, dropped


def read_labels(path: Path, chat: Chat) -> tuple[list[Label], list[Dropped]]:
    """Labels of a TRL unpaired file (`prompt`, `completion`, `label`; text or messages), tokenised as pairs are.

    Raises DataError for a label that is not true or false; faulty rows and repeated ones go to the ledger.
    """
    labels: dict[str, Label] = {}
    dropped: list[Dropped] = []
    for where, row in _rows(path):
        value = _field(row, "label", where)
        if not isinstance(value, bool):
            raise DataError(f"{where}: field 'label' is {value!r}", "write true (desirable) or false (undesirable)")
        try:
            prompt = _messages(_field(row, "prompt", where), where, "prompt", "user")
            turns = _messages(_field(row, "completion", where), where, "completion", "assistant")
            label = _to_label(chat, prompt, turns, label=value)
        except RowFault as fault:
            dropped.append(Dropped(where, fault.reason, fault.detail))
            continue
        if label.completion_id in labels:
            dropped.append(Dropped(label.completion_id, "duplicate", f"{where} repeats an earlier row"))
        labels.setdefault(label.completion_id, label)
    if not labels:
        raise DataError(
            f"{path} has no usable label ({len(dropped)} rows dropped)", "see the reasons in dropped.parquet"
        )
    return list(labels.values()), dropped


def read_ref_logps(runs: Sequence[Path], digests: Mapping[str, str]) -> dict[str, RefLogps]:
    """The cached reference values of the completions in `digests` (completion_id -> ids_digest) from runs of `score` or
    `generate`; the first run that has a completion counts. Which ones are missing is for the caller.

    Raises IdentityError when a value was made for other token ids, DataError for values of several references.
    """
    found: dict[str, RefLogps] = {}
    for run in runs:
        for row in from_table(RefLogps, store.read_dataset(run, "ref_logps", RefLogps)):
            if row.completion_id not in digests or row.completion_id in found:
                continue
            if row.ids_digest != digests[row.completion_id]:
                raise IdentityError(
                    f"{run}: log-probs of {row.completion_id} were made for other token ids (ids_digest)",
                    "score these rows: prefpipe score --inputs DIR --out NEW",
                )
            found[row.completion_id] = row
    references = sorted({row.reference for row in found.values()})
    if len(references) > 1:
        raise DataError(f"the runs hold log-probs of several references: {', '.join(references)}", "pass one at a time")
    return found


def _to_label(chat: Chat, prompt: Messages, turns: Messages, *, label: bool) -> Label:
    turns = _answer_turns(prompt, turns, chat)
    prompt_ids, (answer,) = _tokenise(chat, prompt, [turns])
    return Label(
        completion_id=content_id(prompt_ids, answer, "import"), prompt_id=content_id(prompt, None), prompt=prompt,
        completion=turns, label=label, prompt_token_ids=prompt_ids, token_ids=answer,
        ids_digest=ids_digest(prompt_ids, answer), finish_reason="imported", reward=None, weight=1.0, ref_logps=None,
        ref_token_logps=None, reference=None, scorer=None,
    )  # fmt: skip


def _tokenise(chat: Chat, prompt: Messages, answers: list[Messages]) -> tuple[list[int], list[list[int]]]:
    """Prompt ids, the common token prefix of the prompt alone and every rendering; and what follows, up to its end."""
    alone = encode_prompt(chat, prompt, max_tokens=_NO_LIMIT, control_tokens="allow")
    whole = [encode(chat, render(chat, [*prompt, *turns], add_generation_prompt=False)) for turns in answers]
    shared = common_prefix([alone, *whole])
    return alone[:shared], [_until_eos(ids[shared:], chat) for ids in whole]


def _to_pair(chat: Chat, prompt: Messages, chosen: Messages, rejected: Messages) -> Pair:
    chosen, rejected = (_answer_turns(prompt, turns, chat) for turns in (chosen, rejected))
    prompt_ids, answers = _tokenise(chat, prompt, [chosen, rejected])
    if answers[0] == answers[1]:
        raise RowFault("identical", "chosen and rejected have the same tokens")
    prompt_id = content_id(prompt, None)
    ids = [content_id(prompt_ids, answer, "import") for answer in answers]
    return Pair(
        pair_id=content_id(*ids), prompt_id=prompt_id, chosen_completion_id=ids[0], rejected_completion_id=ids[1],
        prompt=prompt, chosen=chosen, rejected=rejected, prompt_token_ids=prompt_ids, chosen_token_ids=answers[0],
        rejected_token_ids=answers[1], chosen_ids_digest=ids_digest(prompt_ids, answers[0]),
        rejected_ids_digest=ids_digest(prompt_ids, answers[1]), chosen_reward=None, rejected_reward=None,
        reward_gap=None, preference_prob=None, chosen_finish_reason="imported", rejected_finish_reason="imported",
        weight=1.0, ref_chosen_logps=None, ref_rejected_logps=None, ref_chosen_token_logps=None,
        ref_rejected_token_logps=None, reference=None, scorer=None,
    )  # fmt: skip


def _answer_turns(prompt: Messages, turns: Messages, chat: Chat) -> Messages:
    """The turns of the answer alone: many files repeat the prompt in front of them."""
    if turns[: len(prompt)] == prompt:
        turns = turns[len(prompt) :]
    if not turns:
        raise RowFault("empty", "an answer without messages")
    if turns[0]["role"] != "assistant":
        raise RowFault("bad_roles", f"an answer starts with the assistant, not with {turns[0]['role']!r}")
    check_control_tokens(chat, turns)
    return turns


def _until_eos(ids: list[int], chat: Chat) -> list[int]:
    """A completion ends with the end-of-sequence token of its last turn; what the template adds is no part of it."""
    last = max((i for i, t in enumerate(ids) if t in chat.eos_token_ids), default=None)
    while last and ids[last - 1] in chat.eos_token_ids:
        last -= 1
    ids = ids if last is None else ids[: last + 1]
    if not ids:
        raise RowFault("empty", "a completion without tokens")
    return ids


def _to_prompt(row: Mapping[str, Any], where: str) -> Prompt:
    name = "messages" if row.get("messages") is not None else "prompt"
    messages = _messages(_field(row, name, where), where, name, "user")
    answer = row.get("answer")
    if answer is not None and not isinstance(answer, str):
        raise DataError(f"{where}: field 'answer' is {type(answer).__name__}, not text", "write it as text")
    _check_unicode("answer", answer or "")
    extra = {k: v for k, v in row.items() if k not in _PROMPT_COLUMNS}
    return Prompt(
        prompt_id=content_id(messages, answer),
        messages=messages,
        answer=answer,
        split=str(row.get("split") or "train"),
        source=str(row.get("source") or ""),
        meta=json.dumps(extra, ensure_ascii=False, default=str),
    )


def _messages(value: object, where: str, name: str, role: str) -> Messages:
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    ):
        _check_unicode(name, *(text for m in value for text in (m["role"], m["content"])))
        return [Message(role=m["role"], content=m["content"]) for m in value]
    raise DataError(
        f"{where}: field '{name}' is neither text nor a list of messages with 'role' and 'content'",
        'write it as [{"role": "user", "content": "..."}] or as plain text',
    )


def _check_unicode(name: str, *texts: str) -> None:
    """JSON can hold half of a surrogate pair, which is no text: it has no bytes."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise RowFault("not_unicode", f"field '{name}' holds half a character: {error.reason}") from error


def _field(row: Mapping[str, Any], name: str, where: str) -> object:
    if row.get(name) is None:
        raise DataError(f"{where}: field '{name}' is missing (fields: {', '.join(row) or 'none'})", f"add '{name}'")
    return row[name]


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of a JSONL or Parquet file."""
    if not path.is_file():
        raise MissingInputError(f"{path} does not exist", "check the path; it is relative to the current directory")
    if path.suffix == ".parquet":
        for number, row in enumerate(store.read_parquet(path).to_pylist()):
            yield f"{path}, row {number}", row
    elif path.suffix in (".jsonl", ".json"):
        yield from _json_lines(path)
    else:
        raise UsageError(f"{path}: unknown kind of file '{path.suffix}'", "give .jsonl or .parquet")


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where}: not valid JSON: {error}", "every line is one JSON object") from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: not a JSON object", "every line is one JSON object")
            yield where, row
