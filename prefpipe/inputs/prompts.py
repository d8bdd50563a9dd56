"""The prompts of a file: all are checked once, then read one by one; memory does not grow with their number."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefpipe.errors import DataError, RowFault
from prefpipe.ids import content_id
from prefpipe.inputs import formats
from prefpipe.inputs.files import rows
from prefpipe.inputs.tokenised import to_json
from prefpipe.schemas import Dropped, Prompt

_COLUMNS = ("messages", "prompt", "answer", "split", "source", "meta", "prompt_id")


@dataclass(frozen=True)
class Prompts:
    """The prompts of a file that a run samples, read anew at every iteration.

    `kept` has a byte for every row of the file: 1 if its prompt is one of them.
    """

    path: Path
    kept: bytes

    def __len__(self) -> int:
        return sum(self.kept)

    def __iter__(self) -> Iterator[Prompt]:
        for keep, (where, row) in zip(self.kept, rows(self.path), strict=True):
            if keep:
                yield _to_prompt(row, where)

    def part(self, number: int, count: int) -> "Prompts":
        """Every `count`-th prompt, from the `number`-th (1 is the first)."""
        places = [i for i, keep in enumerate(self.kept) if keep][number - 1 :: count]
        kept = bytearray(len(self.kept))
        for place in places:
            kept[place] = 1
        return Prompts(self.path, bytes(kept))


def read_prompts(path: Path, split: str, limit: int) -> tuple[Prompts, list[Dropped]]:
    """Prompts of a JSONL or Parquet file, the rows of `split` ("all" for every row), at most `limit` (0: no limit).

    A row has `messages` (list of role and content) or `prompt` (the same, or plain text as one user message). The
    second result is the ledger of faulty and repeated rows. Every row is checked now. Raises MissingInputError, or
    DataError that names file, line and field.
    """
    kept = bytearray()
    seen: set[str] = set()
    dropped: list[Dropped] = []
    splits: set[str] = set()
    for where, row in rows(path):
        kept.append(0)
        try:
            prompt = _to_prompt(row, where)
        except RowFault as fault:
            dropped.append(Dropped(where, fault.reason, fault.detail))
            continue
        splits.add(prompt.split)
        if split not in ("all", prompt.split):
            continue
        if prompt.prompt_id in seen:
            dropped.append(Dropped(prompt.prompt_id, "duplicate", f"{where} repeats an earlier prompt"))
        elif not limit or len(seen) < limit:
            seen.add(prompt.prompt_id)
            kept[-1] = 1
    if not seen:
        raise DataError(
            f"{path} has no prompt with split '{split}' (splits there: {', '.join(sorted(splits)) or 'none'})",
            "choose one with --split, or 'all'",
        )
    return Prompts(path, bytes(kept)), dropped


def _to_prompt(row: Mapping[str, Any], where: str) -> Prompt:
    name = "messages" if row.get("messages") is not None else "prompt"
    messages = formats.messages(formats.field(row, name, where), where, name, "user")
    answer = row.get("answer")
    if answer is not None and not isinstance(answer, str):
        raise DataError(f"{where}: field 'answer' is {type(answer).__name__}, not text", "write it as text")
    formats.check_unicode("answer", answer or "")
    extra = {k: v for k, v in row.items() if k not in _COLUMNS}
    return Prompt(
        prompt_id=content_id(messages, answer),
        messages=messages,
        answer=answer,
        split=str(row.get("split") or "train"),
        source=str(row.get("source") or ""),
        meta=to_json(extra),
    )
