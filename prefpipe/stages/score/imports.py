"""Shards of foreign files: rows of ours that no earlier row of the run repeats, whatever shard that one is in."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from prefpipe.config.shared import IMPORTED_REWARD
from prefpipe.errors import RowFault
from prefpipe.ids import IdSet, ids_digest
from prefpipe.inputs import files, formats, tokenised
from prefpipe.inputs.files import Placed
from prefpipe.inputs.tokenised import IMPORTED, Limits, Tokenised
from prefpipe.models.chat import Chat
from prefpipe.schemas import Completion, Dropped, Label, Pair, Prompt, Reward

RATING_FOLDER = f"rewards/{IMPORTED_REWARD}"
Known = defaultdict[str, IdSet]  # the keys of the rows that a run has so far, by dataset


@dataclass(frozen=True)
class Imported:
    """Rows of one shard of a foreign file that no earlier row of the run repeats.

    `used` are the completions that these rows are about, new ones and others, by id; `asked` says which prompt a
    completion answers, with the further columns of the row that it stands in.
    """

    prompts: list[Prompt] = field(default_factory=list[Prompt])
    completions: list[Completion] = field(default_factory=list[Completion])
    ratings: list[Reward] = field(default_factory=list[Reward])
    pairs: list[Pair] = field(default_factory=list[Pair])
    labels: list[Label] = field(default_factory=list[Label])
    dropped: list[Dropped] = field(default_factory=list[Dropped])
    used: dict[str, Completion] = field(default_factory=dict[str, Completion])
    asked: dict[str, Prompt] = field(default_factory=dict[str, Prompt])


def chunks(path: str | Path, size: int) -> Iterator[list[Placed]]:
    """Neighbouring rows of a file, `size` at a time: the shards of an import."""
    stream = files.rows(path)
    while chunk := list(islice(stream, size)):
        yield chunk


def import_rows(chunk: list[Placed], kind: str, chat: Chat, limits: Limits, known: Known, *, rated: bool) -> Imported:
    """One shard of a foreign file as rows of ours; their keys are added to `known`. `rated`: the file has ratings, so
    that one which is missing is a row as well.

    Answers with the same tokens are one completion. A row that repeats an earlier one of the run goes to the ledger;
    several pairs, or a pair and a label, may well share a completion.
    """
    made = Imported()
    for where, row in chunk:
        try:
            found = tokenised.tokenise(formats.parse(row, kind, where), chat, limits)
            if kind == "preference":
                pair = tokenised.to_pair(found)
                if not known["pairs"].add(pair.pair_id):
                    raise RowFault("duplicate", "repeats an earlier pair")
                made.pairs.append(pair)
        except RowFault as fault:
            made.dropped.append(Dropped(where, fault.reason, fault.detail))
            continue
        prompt = _to_prompt(found, row)
        if known["prompts"].add(prompt.prompt_id):
            made.prompts.append(prompt)
        for i in range(len(found.answers)):
            made.asked.setdefault(found.completion_id(i), prompt)
            if not _add_answer(made, found, i, known, paired=kind == "preference", rated=rated):
                detail = f"{where} repeats an earlier answer"
                made.dropped.append(Dropped(found.completion_id(i), "duplicate", detail))
    return made


def _add_answer(made: Imported, found: Tokenised, i: int, known: Known, *, paired: bool, rated: bool) -> bool:
    """Add what answer i brings: a completion, a rating, a label, a side of a pair. False when it brings nothing new."""
    completion = _to_completion(found, i)
    key = completion.completion_id
    is_new = known["completions"].add(key)
    if is_new:
        made.completions.append(completion)
    labels = [tokenised.to_label(found)] if found.source.label is not None and known["labels"].add(key) else []
    made.labels.extend(labels)
    ratings = [r for r in _to_ratings(found, i) if (rated or r.reward is not None) and known[RATING_FOLDER].add(key)]
    made.ratings.extend(ratings)
    if is_new or paired or labels:
        made.used[key] = completion
        return True
    return bool(ratings)


def _to_completion(found: Tokenised, i: int) -> Completion:
    return Completion(
        completion_id=found.completion_id(i),
        prompt_id=found.prompt_id,
        sample_index=i,
        text=found.answers[i][-1]["content"],
        prompt_token_ids=found.prompt_ids,
        token_ids=found.token_ids[i],
        finish_reason=found.finish_reason(i),
        policy=found.source.writers[i] or IMPORTED,
        ids_digest=ids_digest(found.prompt_ids, found.token_ids[i]),
    )


def _to_prompt(found: Tokenised, row: formats.Row) -> Prompt:
    return Prompt(
        found.prompt_id, found.prompt, found.source.answer, "train", IMPORTED, tokenised.to_json(formats.others(row))
    )


def _to_ratings(found: Tokenised, i: int) -> list[Reward]:
    """The rating of answer i as a reward, or nothing where the format has none."""
    if found.source.ratings is None:
        return []
    rating = found.source.ratings[i]
    detail = None if rating is not None else "the file has no rating for this answer"
    return [
        Reward(found.completion_id(i), IMPORTED_REWARD, rating, "ok" if rating is not None else "unparsable", detail)
    ]
