"""Which tokens the ids of a run stand for. Rows travel as token ids, so they are rows of any model with these tokens.

A vocabulary is named `SIZE:HEX`: how many ids it has, and the digest of the token of each. What else a tokenizer does
(how it cuts text, what it strips) has no part in it: the ids are there already.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from prefpipe import log
from prefpipe.errors import DataError, IdentityError
from prefpipe.ids import canonical_json
from prefpipe.models import fingerprint
from prefpipe.runs import store

_FIELD = "vocabularies"  # of a manifest's identity; absent in runs that do not know
Tokens = list[tuple[int, str]]


def read(directory: Path) -> Tokens:
    """(id, token) of everything in the tokenizer.json of a model, sorted.

    Raises DataError for a file that is not one.
    """
    path = directory / "tokenizer.json"
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        own = tokenizer["model"]["vocab"]
        if isinstance(own, Mapping):
            found = {(number, token) for token, number in own.items()}
        else:  # Unigram: a list of token and score
            found = {(number, token) for number, (token, _) in enumerate(own)}
        return sorted(found | {(added["id"], added["content"]) for added in tokenizer.get("added_tokens", ())})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a tokenizer: {error}", "fetch or save the model again") from error


def name(tokens: Tokens, size: int | None = None) -> str:
    """The name of a vocabulary, or of its ids below `size` alone: a model with more tokens still has the old ones."""
    kept = [pair for pair in tokens if size is None or pair[0] < size]
    return f"{kept[-1][0] + 1 if kept else 0}:{fingerprint.text_digest(canonical_json(kept))}"


def record(found: Iterable[str]) -> dict[str, list[str]]:
    """What a manifest says beside the models that took part."""
    return {_FIELD: sorted(set(found))}


def recorded(run: Path) -> list[str]:
    """The vocabularies of the rows of a complete run; none where it does not say."""
    return store.read_manifest(run)["identity"].get(_FIELD, [])


def of_sources(sources: Iterable[str], directory: Path) -> list[str]:
    """The vocabularies of the rows of runs and of files, which are tokenised with the model in `directory`."""
    found: list[str] = []
    for source in sources:
        found += recorded(Path(source)) if Path(source).is_dir() else [name(read(directory))]
    return found


def check(runs: Sequence[Path], directory: Path) -> None:
    """Raise IdentityError when a run was made with a tokenizer whose ids are other tokens than those of a model."""
    known = [(run, theirs) for run in runs for theirs in recorded(run)]
    if not known:
        return
    if not (directory / "tokenizer.json").is_file():
        log.warn(f"{directory} has no tokenizer.json: whether the token ids of the rows are its own is not checked")
        return
    tokens = read(directory)
    for run, theirs in known:
        ours = name(tokens, int(theirs.partition(":")[0]))
        if ours != theirs:
            raise IdentityError(
                f"{run} was made with another tokenizer than that of {directory}: the same id is another token "
                f"(tokenizer: {theirs} there, {ours} here)",
                "train on the model that the rows were made for, or tokenise their texts with this one: "
                "`prefpipe build-pairs --format trl`, then give its trl/*.parquet",
            )
