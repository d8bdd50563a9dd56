"""Shards of foreign files as rows of ours, without the rows that repeat an earlier one, in whichever shard that is."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from prefpipe.config.shared import IMPORTED_REWARD
from prefpipe.errors import RowFault
from prefpipe.ids import IdSet
from prefpipe.inputs import files, formats, hub, tokenised
from prefpipe.inputs.files import ForeignRow
from prefpipe.inputs.messages import to_json
from prefpipe.inputs.tokenised import IMPORTED, Limits, Tokenised
from prefpipe.models.chat import Chat
from prefpipe.schemas import Completion, Dropped, Label, Pair, Prompt, Reward

RATING_FOLDER = f"rewards/{IMPORTED_REWARD}"
DESIRABLE = "desirable"  # of the keys of labels, those whose label is true
Known = defaultdict[str, IdSet]  # the keys that the run has written already, by dataset


@dataclass(frozen=True)
class Imported:
    """Rows of one shard of a foreign file that no earlier row of the run repeats.

    prompts, completions, pairs, labels: the rows of these datasets
    ratings: the ratings in the file, as rewards
    dropped: ledger rows of what is faulty or repeated
    used: by completion_id, every completion that these rows need, also one that an earlier shard has written
    prompt_of: by completion_id, the prompt that it answers, with the further columns of its row
    came_in: of each row, what becomes a row of ours or of the ledger: a pair, an answer, or the row where it is faulty
    """

    prompts: list[Prompt] = field(default_factory=list[Prompt])
    completions: list[Completion] = field(default_factory=list[Completion])
    ratings: list[Reward] = field(default_factory=list[Reward])
    pairs: list[Pair] = field(default_factory=list[Pair])
    labels: list[Label] = field(default_factory=list[Label])
    dropped: list[Dropped] = field(default_factory=list[Dropped])
    used: dict[str, Completion] = field(default_factory=dict[str, Completion])
    prompt_of: dict[str, Prompt] = field(default_factory=dict[str, Prompt])
    came_in: list[int] = field(default_factory=list[int])


def chunks(path: str | Path, size: int, columns: Mapping[str, str]) -> Iterator[list[ForeignRow]]:
    """The rows of a file, `size` at a time: one shard each. `columns` renames some."""
    stream = files.rows(path, columns)
    while chunk := list(islice(stream, size)):
        yield chunk


def rows_digest(chunk: list[ForeignRow], source: str) -> str:
    """The digest of the rows of a shard, and of their places in the source, which ledger rows name."""
    hasher = hashlib.blake2b(digest_size=16)
    prefix = source if hub.is_hub(source) else str(Path(source))  # as `files.rows` names it
    for where, row in chunk:
        try:
            text = repr(row)
        except RecursionError:  # its lists are too deep: the row goes to the ledger whatever it says
            text = ""
        hasher.update(f"{where.removeprefix(prefix)}\n{len(text)}\n{text}\n".encode(errors="surrogatepass"))
    return hasher.hexdigest()


def import_rows(
    chunk: list[ForeignRow], kind: str, chat: Chat, limits: Limits, known: Known, *, rated: bool
) -> Imported:
    """One shard of a foreign file as rows of ours; their keys are added to `known`. `rated`: the file has ratings, so
    that a missing one is a row as well.

    Answers with the same tokens are one completion. A row that repeats an earlier one of the run goes to the ledger;
    several pairs, or a pair and a label, may well share a completion.
    """
    imported = Imported()
    for where, row in chunk:
        try:
            source = tokenised.tokenise(formats.parse(row, kind), chat, limits)
            if kind == "preference":
                pair = tokenised.to_pair(source)
                if not known["pairs"].add(pair.pair_id):
                    raise RowFault("duplicate", "repeats an earlier pair")
                imported.pairs.append(pair)
        except RowFault as fault:
            imported.dropped.append(Dropped(where, fault.reason, fault.detail))
            imported.came_in.append(1)
            continue
        imported.came_in.append(1 if kind == "preference" else len(source.answers))
        prompt = _to_prompt(source, row)
        if known["prompts"].add(prompt.prompt_id):
            imported.prompts.append(prompt)
        for i in range(len(source.answers)):
            imported.prompt_of.setdefault(source.completion_id(i), prompt)
            key, label = source.completion_id(i), source.answered.label
            conflicting = label is not None and key in known["labels"] and (key in known[DESIRABLE]) != label
            if not _add_answer(imported, source, i, known, paired=kind == "preference", rated=rated):
                imported.dropped.append(tokenised.repeated(key, where, conflicting=conflicting))
    return imported


def _add_answer(imported: Imported, source: Tokenised, i: int, known: Known, *, paired: bool, rated: bool) -> bool:
    """Add the completion, the label and the rating of answer i, each if it is new. Returns whether the answer is of
    any use: it brings one of these, or is one side of a pair."""
    completion = tokenised.to_completion(source, i)
    key = completion.completion_id
    is_new = known["completions"].add(key)
    if is_new:
        imported.completions.append(completion)
    is_labelled = source.answered.label is not None and known["labels"].add(key)
    if is_labelled and source.answered.label:
        known[DESIRABLE].add(key)
    if is_labelled:
        imported.labels.append(tokenised.to_label(source))
    rating = _to_rating(source, i)
    is_rated = rating is not None and (rated or rating.reward is not None) and known[RATING_FOLDER].add(key)
    if rating is not None and is_rated:
        imported.ratings.append(rating)
    if is_new or paired or is_labelled:
        imported.used[key] = completion
        return True
    return is_rated


def _to_prompt(source: Tokenised, row: formats.Row) -> Prompt:
    return Prompt(
        prompt_id=source.prompt_id,
        messages=source.prompt,
        answer=source.answered.answer,
        split="train",
        source=IMPORTED,
        meta=to_json(formats.others(row)),
        template_inputs=source.answered.template_inputs,
    )


def _to_rating(source: Tokenised, i: int) -> Reward | None:
    """The rating of answer i as a reward; None where the format has no ratings."""
    if source.answered.ratings is None:
        return None
    rating = source.answered.ratings[i]
    if rating is None:
        detail = "the file has no rating for this answer"
        return Reward(source.completion_id(i), IMPORTED_REWARD, None, "unparsable", detail)
    return Reward(source.completion_id(i), IMPORTED_REWARD, rating, "ok", None)
