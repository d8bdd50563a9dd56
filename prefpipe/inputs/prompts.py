"""The prompts of a file: all are checked once, then read one by one; memory does not grow with their number."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Any

from prefpipe.errors import DataError, RowFault
from prefpipe.inputs import files, formats, hub, messages, prompt_columns
from prefpipe.inputs.files import rows
from prefpipe.inputs.tokenised import prompt_key
from prefpipe.rows import why_dropped
from prefpipe.schemas import Dropped, Prompt

_READ = ("answer", "split", "source", "meta", "prompt_id")
_KEPT, _FAULTY = 1, 2


class _Copy:
    """The prompts of a stream in a temporary file, so that the stream is read once."""

    def __init__(self) -> None:
        self._file = tempfile.NamedTemporaryFile()  # noqa: SIM115  (it lives as long as the copy)

    def add(self, prompt: Prompt) -> None:
        self._file.write(json.dumps(vars(prompt)).encode() + b"\n")

    def __iter__(self) -> Iterator[Prompt]:
        self._file.flush()
        with Path(self._file.name).open("rb") as lines:
            yield from (Prompt(**json.loads(line)) for line in lines)


@dataclass(frozen=True)
class Prompts:
    """The prompts of a file that a run samples, read anew at every iteration, from a `copy` where there is one.

    `kept` has a byte for every row of the file: 1 if its prompt is one of them, 2 if the row is faulty. A faulty row
    holds its place, so that the prompts keep theirs when it is mended; the other rows have none (0).
    """

    path: str | Path
    kept: bytes
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    copy: _Copy | None = None

    def __len__(self) -> int:
        return self.kept.count(_KEPT)

    def __iter__(self) -> Iterator[Prompt]:
        return (prompt for prompt in self.places() if prompt is not None)

    @property
    def num_places(self) -> int:
        """How many values `places` has."""
        return len(self) + self.kept.count(_FAULTY)

    def places(self) -> Iterator[Prompt | None]:
        """The prompts in their order, None in the place of a faulty row. Raises DataError when the rows are
        other ones than before."""
        try:
            if self.copy is not None:
                yield from compress(self.copy, self.kept)
                return
            for place, (_, row) in zip(self.kept, rows(self.path, self.columns), strict=True):
                if place:
                    yield _to_prompt(row) if place == _KEPT else None
        except (RowFault, ValueError) as error:
            raise files.changed(self.path) from error

    def without_places(self) -> "Prompts":
        """These prompts, of which faulty rows hold no place: so runs of an older version cut them into shards."""
        return replace(self, kept=self.kept.replace(bytes([_FAULTY]), bytes(1)))

    def part(self, number: int, count: int) -> "Prompts":
        """Every `count`-th place, from the `number`-th (1 is the first)."""
        taken = bytearray(len(self.kept))
        for place in [i for i, row in enumerate(self.kept) if row][number - 1 :: count]:
            taken[place] = self.kept[place]
        return replace(self, kept=bytes(taken))


def read_prompts(
    path: str | Path, split: str, limit: int, columns: Mapping[str, str] | None = None
) -> tuple[Prompts, list[Dropped]]:
    """Prompts of a file, folder or dataset of the hub, the rows of `split` ("all" for every row), at most `limit` (0:
    no limit).

    `formats` says which columns hold a prompt; `columns` renames some. The second result is the ledger of faulty and
    repeated rows. Every row is checked now. Raises what `files.rows` raises, and DataError where no prompt is left.
    """
    columns = columns or {}
    copy = _Copy() if hub.is_hub(path) else None
    found = bytearray()
    seen: set[str] = set()
    dropped: list[Dropped] = []
    splits: set[str] = set()
    for where, row in rows(path, columns):
        found.append(0)
        in_split = split in ("all", _split(row))
        is_wanted = in_split and (not limit or len(seen) < limit)
        try:
            prompt = _to_prompt(row)
        except RowFault as fault:
            dropped.append(Dropped(where, fault.reason, fault.detail))
            found[-1] = _FAULTY if is_wanted else 0
            continue
        splits.add(prompt.split)
        if in_split and prompt.prompt_id in seen:
            dropped.append(Dropped(prompt.prompt_id, "duplicate", f"{where} repeats an earlier prompt"))
        elif is_wanted:
            seen.add(prompt.prompt_id)
            found[-1] = _KEPT
            if copy is not None:
                copy.add(prompt)
    if not splits:
        raise DataError(f"{path} has no usable prompt: {why_dropped(dropped)}", "docs/datasets.md says what is read")
    if not seen:
        raise DataError(
            f"{path} has no prompt with split '{split}' (splits there: {', '.join(sorted(splits)) or 'none'})",
            "choose one with --split, or 'all'",
        )
    kept = bytes(found) if copy is None else bytes([_KEPT]) * len(seen)
    return Prompts(path, kept, columns, copy), dropped


def _split(row: Mapping[str, Any]) -> str:
    return str(row.get("split") or "train")


def _to_prompt(row: Mapping[str, Any]) -> Prompt:
    messages.check_carried(row)
    prompt, inputs = prompt_columns.prompt_of(row), messages.template_inputs(row)
    answer = row.get("answer")
    answer = None if answer is None else messages.text(answer, "answer")
    extra = {name: value for name, value in formats.others(row).items() if name not in _READ}
    return Prompt(
        prompt_id=prompt_key(prompt, answer, inputs),
        messages=prompt,
        answer=answer,
        split=_split(row),
        source=str(row.get("source") or ""),
        meta=messages.to_json(extra),
        template_inputs=inputs,
    )
