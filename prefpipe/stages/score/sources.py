"""What `prefpipe score` reads: shards of our runs and of foreign files, each as rows, token ids and answers to rate."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from prefpipe import log
from prefpipe.engines import base
from prefpipe.errors import DataError, IdentityError, MissingInputError
from prefpipe.ids import ids_digest
from prefpipe.inputs import formats
from prefpipe.inputs.files import Placed
from prefpipe.inputs.tokenised import Limits
from prefpipe.models.chat import Chat
from prefpipe.rewards.base import Answer
from prefpipe.rows import PREFERENCES, key_of, parts_of
from prefpipe.runs import store
from prefpipe.runs.store import Manifest
from prefpipe.schemas import Completion, Dropped, Prompt, Reward, from_table
from prefpipe.stages.score import imports
from prefpipe.stages.score.imports import RATING_FOLDER, Known

ENGINE_DIED = "engine_died"
_ADDED = {"preference": ("pairs",), "label": ("labels",)}


@dataclass(frozen=True)
class Batch:
    """Rows of one shard: datasets to write beside the scores, what to score, what to rate, what was left out.

    `elsewhere` are the ids of sequences that an earlier shard holds: scored for this one's rows, not written again.
    """

    rows: dict[str, list[Any]]
    sequences: list[base.ScoreRequest]
    answers: list[tuple[str, Answer]]
    ratings: list[Reward]
    dropped: list[Dropped]
    elsewhere: frozenset[str] = frozenset()


_Prompts = Callable[[str, set[str]], dict[str, Prompt]]
Read = tuple[tuple[str, ...], Callable[[], Batch]]  # the datasets of a shard beside its scores, and how to read it


@dataclass(frozen=True)
class Reader:
    """How inputs are read: with which tokenizer, up to which length, how many rows at a time, with answers to rate, and
    beside which rows of foreign files that the run has so far."""

    chat: Chat
    limits: Limits
    rows: int
    rated: bool
    known: Known


def without(batch: Batch, killers: Collection[str]) -> Batch:
    """A batch without the completions that kill the engine, and without every row that is about one of them: each has
    its line in the ledger, and what only they need is not scored. Prompts stay: they may have other completions."""
    if not killers:
        return batch
    fatal: dict[str, str] = {}  # the key of a row, and the completion of it that kills
    rows: dict[str, list[Any]] = {}
    for dataset, given in batch.rows.items():
        fatal |= {key_of(row): name for row in given for name, *_ in parts_of(row) if name in killers}
        rows[dataset] = [row for row in given if key_of(row) not in fatal]
    if batch.rows:
        needed = {name for kept in rows.values() for row in kept for name, *_ in parts_of(row)}
    else:  # completions of a run, which are not written again
        names = [s.completion_id for s in batch.sequences]
        needed = {name for name in names if name not in killers}
        fatal = {name: name for name in names if name in killers}
    fatal |= {r.completion_id: r.completion_id for r in batch.ratings if r.completion_id in killers}
    return replace(
        batch,
        rows=rows,
        sequences=[s for s in batch.sequences if s.completion_id in needed],
        answers=[(name, answer) for name, answer in batch.answers if name not in killers],
        ratings=[r for r in batch.ratings if r.completion_id not in killers],
        dropped=[
            *batch.dropped,
            *(Dropped(key, ENGINE_DIED, f"the engine died twice on completion {name}") for key, name in fatal.items()),
        ],
    )


def digest(source: str) -> str:
    """What identifies an input: a run or file by content, an hf:// path by its name and revision."""
    if source.startswith("hf://"):
        if "@" not in source:
            log.warn(f"{source} names no revision: it may change; write hf://datasets/OWNER/NAME@REVISION/FILE")
        return source
    return store.input_digest(Path(source))


def shards(source: str, reader: Reader) -> Iterator[Read]:
    """The shards of one input, in order; a shard is read only when its function is called.

    Those of files must be read in their order, once: a row that repeats one of an earlier shard is left out.
    """
    if Path(source).is_dir():
        return _of_run(Path(source), reader)
    return _of_file(source, reader)


def _of_file(source: str, reader: Reader) -> Iterator[Read]:
    kind, datasets = "", ("prompts", "completions")
    for chunk in imports.chunks(source, reader.rows):
        if not kind:
            where, row = chunk[0]
            kind = formats.recognise(row, where)
            datasets += _ADDED.get(kind, ())
            datasets += (RATING_FOLDER,) if formats.has_ratings(row, kind) else ()
        yield datasets, partial(_import, chunk, kind, reader, with_ratings=RATING_FOLDER in datasets)
    if not kind:
        raise DataError(f"{source} has no rows", "check the file")


def _of_run(source: Path, reader: Reader) -> Iterator[Read]:
    manifest = store.read_manifest(source)
    present = store.datasets(manifest)
    if "completions" in present:
        prompts = partial(_prompts, source, manifest, {})
        for name in store.part_names(source, manifest, "completions"):
            yield (), partial(_completions, source, manifest, name, reader, prompts)
        return
    known = [name for name in PREFERENCES if name in present]
    if not known:
        raise MissingInputError(f"{source} has nothing to score", f"it has: {', '.join(present) or 'no dataset'}")
    if reader.rated:
        raise MissingInputError(f"{source} holds no completions to rate", "pass the run that its completions come from")
    for dataset in known:
        for name in store.part_names(source, manifest, dataset):
            table = store.read_file(source, manifest, name, PREFERENCES[dataset])
            for start in range(0, table.num_rows, reader.rows):
                rows = table.slice(start, reader.rows)
                yield (dataset,), partial(_preferences, source, dataset, rows, reader.limits.max_length)


def notice_other_chat(source: Path, chat: Chat) -> None:
    """Ids are scored as they are, so another tokenizer or template changes no value; but the user should know."""
    manifest = store.read_manifest(source)
    for name in ("tokenizer", "chat_template"):
        theirs = manifest["inputs"].get(name)
        if theirs is not None and theirs != chat.digests[name]:
            log.warn(f"{source} was made with another {name.replace('_', ' ')}: its token ids are scored as they are")


def _import(chunk: list[Placed], kind: str, reader: Reader, *, with_ratings: bool) -> Batch:
    made = imports.import_rows(chunk, kind, reader.chat, reader.limits, reader.known, rated=with_ratings)
    if not with_ratings and any(r.reward is not None for r in made.ratings):
        raise DataError(
            f"{chunk[0][0]}: here or below an answer has a rating, but the first row of the file has no such field",
            "give every row the same fields; a missing rating is null",
        )
    rows: dict[str, list[Any]] = {"prompts": made.prompts, "completions": made.completions}
    rows |= {"pairs": made.pairs, "labels": made.labels}
    sequences = [base.ScoreRequest(c.completion_id, c.prompt_token_ids, c.token_ids) for c in made.used.values()]
    elsewhere = frozenset(made.used).difference(c.completion_id for c in made.completions)
    answers = [_answer(c, made.asked[c.completion_id]) for c in made.completions]
    return Batch(rows, sequences, answers, made.ratings, made.dropped, elsewhere)


def _completions(source: Path, manifest: Manifest, name: str, reader: Reader, prompts: _Prompts) -> Batch:
    """A part of the completions of one of our runs."""
    found = from_table(Completion, store.read_file(source, manifest, name, Completion))
    sequences = [_verified(source, c.completion_id, c.prompt_token_ids, c.token_ids, c.ids_digest) for c in found]
    kept, dropped = _fitting(sequences, reader.limits.max_length)
    asked = prompts(name.replace("completions/", "prompts/"), {c.prompt_id for c in found}) if reader.rated else {}
    return Batch({}, kept, [_answer(c, asked[c.prompt_id]) for c in found if reader.rated], [], dropped)


def _prompts(
    source: Path, manifest: Manifest, places: dict[str, str], beside: str, wanted: set[str]
) -> dict[str, Prompt]:
    """Prompts of a run by id. `beside` is the part that belongs to the completions which answer them; a prompt that
    comes up again stands in an earlier part only: `places`, the part of every prompt, is filled when that is needed."""
    found = {p.prompt_id: p for p in from_table(Prompt, store.read_file(source, manifest, beside, Prompt))}
    lacking = wanted - found.keys()
    if lacking and not places:
        for name in store.part_names(source, manifest, "prompts"):
            ids = store.read_file(source, manifest, name, Prompt, ["prompt_id"])["prompt_id"].to_pylist()
            places.update(dict.fromkeys(ids, name))
    for name in sorted({places[prompt_id] for prompt_id in lacking}):
        part = from_table(Prompt, store.read_file(source, manifest, name, Prompt))
        found |= {p.prompt_id: p for p in part if p.prompt_id in lacking}
    return found


def _preferences(source: Path, dataset: str, table: pa.Table, max_length: int) -> Batch:
    """Rows of pairs, labels, KL bank or groups of one of our runs. A row with an overlong completion is left out."""
    rows = from_table(PREFERENCES[dataset], table)
    kept: list[Any] = []
    dropped: list[Dropped] = []
    sequences: dict[str, base.ScoreRequest] = {}
    for row in rows:
        own = [_verified(source, *parts) for parts in parts_of(row)]
        _, overlong = _fitting(own, max_length)
        dropped += overlong
        if not overlong:
            kept.append(row)
            sequences |= {s.completion_id: s for s in own}
    return Batch({dataset: kept}, list(sequences.values()), [], [], dropped)


def _verified(source: Path, name: str, prompt: list[int], ids: list[int], digest: str) -> base.ScoreRequest:
    if ids_digest(prompt, ids) != digest:
        raise IdentityError(
            f"{source}: the token ids of {name} do not match their digest (ids_digest)",
            "rows were edited or shuffled: make that run again",
        )
    return base.ScoreRequest(name, prompt, ids)


def _fitting(sequences: Sequence[base.ScoreRequest], max_length: int) -> tuple[list[base.ScoreRequest], list[Dropped]]:
    kept: list[base.ScoreRequest] = []
    dropped: list[Dropped] = []
    for s in sequences:
        length = len(s.prompt_token_ids) + len(s.token_ids)
        if length <= max_length:
            kept.append(s)
        else:
            detail = f"{length} tokens in prompt and completion, max_length is {max_length}"
            dropped.append(Dropped(s.completion_id, "too_long", detail))
    return kept, dropped


def _answer(c: Completion, p: Prompt) -> tuple[str, Answer]:
    return c.completion_id, Answer(p.messages, c.text, p.answer, p.meta, len(c.token_ids))
