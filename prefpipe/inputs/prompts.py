"""The prompts of a file: all are checked once, then read one by one; memory does not grow with their number."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefpipe.errors import DataError, RowFault
from prefpipe.inputs import formats, messages
from prefpipe.inputs.files import rows
from prefpipe.inputs.tokenised import prompt_key
from prefpipe.rows import why_dropped
from prefpipe.schemas import Dropped, Prompt

_READ = ("answer", "split", "source", "meta", "prompt_id")


@dataclass(frozen=True)
class Prompts:
    """The prompts of a file that a run samples, read anew at every iteration.

    `kept` has a byte for every row of the file: 1 if its prompt is one of them.
    """

    path: str | Path
    kept: bytes
    columns: Mapping[str, str] = field(default_factory=dict[str, str])

    def __len__(self) -> int:
        return sum(self.kept)

    def __iter__(self) -> Iterator[Prompt]:
        for keep, (_, row) in zip(self.kept, rows(self.path, self.columns), strict=True):
            if keep:
                yield _to_prompt(row)

    def part(self, number: int, count: int) -> "Prompts":
        """Every `count`-th prompt, from the `number`-th (1 is the first)."""
        places = [i for i, keep in enumerate(self.kept) if keep][number - 1 :: count]
        kept = bytearray(len(self.kept))
        for place in places:
            kept[place] = 1
        return Prompts(self.path, bytes(kept), self.columns)


def read_prompts(
    path: str | Path, split: str, limit: int, columns: Mapping[str, str] | None = None
) -> tuple[Prompts, list[Dropped]]:
    """Prompts of a file, folder or dataset of the hub, the rows of `split` ("all" for every row), at most `limit` (0:
    no limit).

    `formats` says which columns hold a prompt; `columns` renames some. The second result is the ledger of faulty and
    repeated rows. Every row is checked now. Raises what `files.rows` raises, and DataError where no prompt is left.
    """
    columns = columns or {}
    kept = bytearray()
    seen: set[str] = set()
    dropped: list[Dropped] = []
    splits: set[str] = set()
    for where, row in rows(path, columns):
        kept.append(0)
        try:
            prompt = _to_prompt(row)
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
    if not splits:
        raise DataError(f"{path} has no usable prompt: {why_dropped(dropped)}", "docs/datasets.md says what is read")
    if not seen:
        raise DataError(
            f"{path} has no prompt with split '{split}' (splits there: {', '.join(sorted(splits)) or 'none'})",
            "choose one with --split, or 'all'",
        )
    return Prompts(path, bytes(kept), columns), dropped


def _to_prompt(row: Mapping[str, Any]) -> Prompt:
    messages.check_carried(row)
    prompt, inputs = formats.prompt_of(row), messages.template_inputs(row)
    answer = row.get("answer")
    answer = None if answer is None else messages.text(answer, "answer")
    extra = {name: value for name, value in formats.others(row).items() if name not in _READ}
    return Prompt(
        prompt_id=prompt_key(prompt, answer, inputs),
        messages=prompt,
        answer=answer,
        split=str(row.get("split") or "train"),
        source=str(row.get("source") or ""),
        meta=messages.to_json(extra),
        template_inputs=inputs,
    )
