"""The shards that `prefpipe score` reads, of our runs and of foreign files: rows to write, to score and to rate."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from prefpipe import log
from prefpipe.engines.base import ScoreRequest
from prefpipe.errors import DataError, MissingInputError, UsageError
from prefpipe.ids import content_id, numbered_id
from prefpipe.inference.scoring import request_of
from prefpipe.inputs import files, formats, hub
from prefpipe.inputs.files import ForeignRow
from prefpipe.inputs.tokenised import Limits
from prefpipe.models.chat import Chat
from prefpipe.models.thinking import Said
from prefpipe.rewards.base import Answer, RewardOn, answer_of
from prefpipe.rows import PREFERENCES, check_ids, completions_of, key_of
from prefpipe.runs import manifests, store
from prefpipe.runs.store import Manifest
from prefpipe.schemas import Completion, Dropped, Prompt, Reward, from_table
from prefpipe.stages.score import imports
from prefpipe.stages.score.imports import RATING_FOLDER, Known

ENGINE_DIED = "engine_died"
_ADDED = {"preference": ("pairs",), "label": ("labels",)}
_Prompts = Callable[[str, set[str]], dict[str, Prompt]]


@dataclass(frozen=True)
class ShardRows:
    """The rows of one shard of an input.

    rows: by dataset, the rows to write beside the scores
    requests: the completions to score
    answers: (completion_id, answer) to rate
    ratings: the ratings in the file, as rewards
    dropped: ledger rows of what is left out
    written_before: ids of the completions in `requests` that an earlier shard writes: they are scored for the pairs and
        labels of this shard, and their log-probs are not written again
    came_in: how many pairs, answers and faulty rows of a foreign file, each of which is kept or in the ledger
    """

    rows: dict[str, list[Any]]
    requests: list[ScoreRequest]
    answers: list[tuple[str, Answer]]
    ratings: list[Reward]
    dropped: list[Dropped]
    written_before: frozenset[str] = frozenset()
    came_in: int | None = None


@dataclass(frozen=True)
class InputShard:
    """A shard of an input: the datasets that it brings beside the scores, the function that reads it, and the digest of
    its rows."""

    datasets: tuple[str, ...]
    read: Callable[[], ShardRows]
    digest: str


@dataclass(frozen=True)
class Reader:
    """How inputs are read.

    chat: tokenizer and chat template for foreign files
    limits: how long a row may be
    shard_rows: rows in a shard of a foreign file, or of pairs, labels and groups of a run
    columns: names of ours to columns of foreign files
    reward_on: what rewards see of a completion
    rated: whether rewards are asked for, so that answers are read as well
    known: keys that this run has written already, by dataset, to drop repeats in foreign files
    share, seed: which preferences of runs are read at all
    """

    chat: Chat
    limits: Limits
    shard_rows: int
    columns: Mapping[str, str]
    reward_on: RewardOn
    rated: bool
    known: Known
    share: float = 1.0
    seed: int = 0


def without(shard: ShardRows, killers: Collection[str]) -> ShardRows:
    """A shard without the completions that kill the engine, and without every row that is about one of them: each has
    its line in the ledger. What only those rows need is not scored. Prompts stay: they may have other completions."""
    if not killers:
        return shard
    fatal: dict[str, str] = {}  # key of a row -> the completion of it that kills
    rows: dict[str, list[Any]] = {}
    for dataset, dataset_rows in shard.rows.items():
        fatal |= {key_of(row): key for row in dataset_rows for key, *_ in completions_of(row) if key in killers}
        rows[dataset] = [row for row in dataset_rows if key_of(row) not in fatal]
    if shard.rows:
        needed = {key for kept in rows.values() for row in kept for key, *_ in completions_of(row)}
    else:  # completions of a run, which are not written again
        ids = [request.completion_id for request in shard.requests]
        needed = set(ids).difference(killers)
        fatal = {completion_id: completion_id for completion_id in ids if completion_id in killers}
    fatal |= {r.completion_id: r.completion_id for r in shard.ratings if r.completion_id in killers}
    lost = [
        Dropped(key, ENGINE_DIED, f"the engine died twice on completion {completion_id}")
        for key, completion_id in fatal.items()
    ]
    return replace(
        shard,
        rows=rows,
        requests=[request for request in shard.requests if request.completion_id in needed],
        answers=[(completion_id, answer) for completion_id, answer in shard.answers if completion_id not in killers],
        ratings=[rating for rating in shard.ratings if rating.completion_id not in killers],
        dropped=[*shard.dropped, *lost],
    )


def shards(source: str, reader: Reader) -> Iterator[InputShard]:
    """The shards of one input, in order; the rows of a shard are read only when its function is called.

    Those of files must be read in their order, once: a row that repeats one of an earlier shard is left out.
    """
    if files.is_run(source):
        return _of_run(Path(source), reader)
    return _of_file(source, reader)


def check_format(source: str, columns: Mapping[str, str]) -> None:
    """Raise DataError for a foreign source without rows, with columns of no format or, in a file of this machine, with
    a row that cannot be read at all: before an engine starts, and before a shard is written."""
    rows = files.rows(source, columns)
    found = next(rows, None)
    if found is None:
        raise DataError(f"{source} has no rows", "check the file")
    formats.recognise(found[1], found[0])
    if not hub.is_hub(source):
        for _ in rows:
            pass


def check_share(inputs: Sequence[str], share: float) -> None:
    """Raise UsageError when a share is asked for of anything but pairs, labels or groups of runs."""
    for source in inputs if share < 1 else ():
        if not files.is_run(source) or "completions" in manifests.datasets(store.read_manifest(Path(source))):
            raise UsageError(
                f"share = {share:g} is drawn from pairs, labels or groups of runs, and {source} is none",
                "leave --share out, or give a run of build-pairs",
            )


def _of_file(source: str, reader: Reader) -> Iterator[InputShard]:
    kind, datasets = "", ("prompts", "completions")
    for chunk in imports.chunks(source, reader.shard_rows, reader.columns):
        if not kind:
            where, row = chunk[0]
            kind = formats.recognise(row, where)
            datasets += _ADDED.get(kind, ())
            datasets += (RATING_FOLDER,) if formats.has_ratings([row for _, row in chunk], kind) else ()
        digest = content_id(kind, datasets, imports.rows_digest(chunk, source))
        read = partial(_import, chunk, kind, reader, with_ratings=RATING_FOLDER in datasets)
        yield InputShard(datasets, read, digest)


def _of_run(source: Path, reader: Reader) -> Iterator[InputShard]:
    manifest = store.read_manifest(source)
    present = manifests.datasets(manifest)
    if "completions" in present:
        prompts = partial(_prompts, source, manifest, {})
        for name in store.part_names(source, manifest, "completions"):
            read = partial(_completions, source, manifest, name, reader, prompts)
            yield InputShard((), read, content_id(manifest["digest"], name))
        return
    preferences = [name for name in PREFERENCES if name in present]
    if not preferences:
        raise manifests.other_kind(source, manifest["command"], "generate or build-pairs", "--inputs")
    if reader.rated:
        raise MissingInputError(f"{source} holds no completions to rate", "pass the run that its completions come from")
    for dataset in preferences:
        for name in store.part_names(source, manifest, dataset):
            table = store.read_file(source, manifest, name, PREFERENCES[dataset])
            for start in range(0, table.num_rows, reader.shard_rows):
                rows = table.slice(start, reader.shard_rows)
                read = partial(_preferences, source, dataset, rows, reader)
                yield InputShard((dataset,), read, content_id(manifest["digest"], name, start))


def notice_other_chat(source: Path, chat: Chat) -> None:
    """Warn about a run that was made with another tokenizer or chat template. Its ids are scored as they are, so this
    changes no value; but the user should know."""
    manifest = store.read_manifest(source)
    for name in ("tokenizer", "chat_template"):
        recorded = manifest["inputs"].get(name)
        if recorded is not None and recorded != chat.digests[name]:
            log.warn(f"{source} was made with another {name.replace('_', ' ')}: its token ids are scored as they are")


def _import(chunk: list[ForeignRow], kind: str, reader: Reader, *, with_ratings: bool) -> ShardRows:
    imported = imports.import_rows(chunk, kind, reader.chat, reader.limits, reader.known, rated=with_ratings)
    if not with_ratings and any(r.reward is not None for r in imported.ratings):
        raise DataError(
            f"{chunk[0][0]}: here or below an answer has a rating, but the first rows of the file have no such field",
            "give every row the same fields; a missing rating is null",
        )
    rows: dict[str, list[Any]] = {"prompts": imported.prompts, "completions": imported.completions}
    rows |= {"pairs": imported.pairs, "labels": imported.labels}
    written_before = frozenset(imported.used).difference(c.completion_id for c in imported.completions)
    return ShardRows(
        rows,
        [request_of(c) for c in imported.used.values()],
        [_answer(c, imported.prompt_of[c.completion_id], reader) for c in imported.completions],
        imported.ratings,
        imported.dropped,
        written_before,
        sum(imported.came_in),
    )


def _completions(source: Path, manifest: Manifest, name: str, reader: Reader, prompts: _Prompts) -> ShardRows:
    """A part of the completions of one of our runs."""
    completions = from_table(Completion, store.read_file(source, manifest, name, Completion))
    for completion in completions:
        check_ids(completion, source)
    requests, overlong = _fitting([request_of(c) for c in completions], reader.limits.max_length)
    answers: list[tuple[str, Answer]] = []
    if reader.rated:
        prompt_of = prompts(name.replace("completions/", "prompts/"), {c.prompt_id for c in completions})
        answers = [_answer(c, prompt_of[c.prompt_id], reader) for c in completions]
    return ShardRows({}, requests, answers, [], overlong)


def _prompts(
    source: Path, manifest: Manifest, places: dict[str, str], beside: str, wanted: set[str]
) -> dict[str, Prompt]:
    """Prompts of a run by id.

    `beside` is the part that belongs to the completions which answer them. A prompt that comes up again stands in an
    earlier part only: then `places`, the part of every prompt, is filled, once for all calls.
    """
    prompts = {p.prompt_id: p for p in from_table(Prompt, store.read_file(source, manifest, beside, Prompt))}
    lacking = wanted - prompts.keys()
    if lacking and not places:
        for name in store.part_names(source, manifest, "prompts"):
            ids = store.read_file(source, manifest, name, Prompt, ["prompt_id"])["prompt_id"].to_pylist()
            places.update(dict.fromkeys(ids, name))
    for name in sorted({places[prompt_id] for prompt_id in lacking}):
        part = from_table(Prompt, store.read_file(source, manifest, name, Prompt))
        prompts |= {p.prompt_id: p for p in part if p.prompt_id in lacking}
    return prompts


def _preferences(source: Path, dataset: str, table: pa.Table, reader: Reader) -> ShardRows:
    """Rows of pairs, labels, KL bank or groups of one of our runs, or a share of them. A row with an overlong
    completion is left out."""
    kept: list[Any] = []
    dropped: list[Dropped] = []
    requests: dict[str, ScoreRequest] = {}
    for row in from_table(PREFERENCES[dataset], table):
        if not _is_drawn(key_of(row), reader):
            continue
        check_ids(row, source)
        row_requests = [ScoreRequest(*of_row[:-1]) for of_row in completions_of(row)]
        _, overlong = _fitting(row_requests, reader.limits.max_length)
        dropped += overlong
        if not overlong:
            kept.append(row)
            requests |= {request.completion_id: request for request in row_requests}
    return ShardRows({dataset: kept}, list(requests.values()), [], [], dropped)


def _is_drawn(key: str, reader: Reader) -> bool:
    """Whether a row is in the share: by hash, so that order and shards do not matter."""
    return reader.share == 1 or int(numbered_id(key, reader.seed)[:8], 16) < reader.share * 2**32


def _fitting(requests: Sequence[ScoreRequest], max_length: int) -> tuple[list[ScoreRequest], list[Dropped]]:
    """Requests of at most `max_length` tokens, and the ledger of the longer ones."""
    fitting: list[ScoreRequest] = []
    overlong: list[Dropped] = []
    for request in requests:
        length = len(request.prompt_token_ids) + len(request.token_ids)
        if length <= max_length:
            fitting.append(request)
        else:
            detail = f"{length} tokens in prompt and completion, max_length is {max_length}"
            overlong.append(Dropped(request.completion_id, "too_long", detail))
    return fitting, overlong


def _answer(completion: Completion, prompt: Prompt, reader: Reader) -> tuple[str, Answer]:
    """A completion to rate. One of a run from before reasoning was parted from the answer is parted now."""
    said = Said(completion.text, completion.thinking, completion.thinking_tokens)
    if completion.thinking_tokens is None:
        said = reader.chat.said(completion.token_ids, completion.text)
    return completion.completion_id, answer_of(prompt, said, len(completion.token_ids), reader.reward_on)
