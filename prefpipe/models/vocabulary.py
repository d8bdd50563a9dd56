"""The tokens that the ids of a run stand for. Rows travel as token ids, so that any model with the same tokens can read
them.

A vocabulary is named `SIZE:HEX`: its number of ids, and a digest of the token of each id. How a tokenizer cuts text
into tokens has no part in it, because the ids exist already. The tokens are those of the tokenizer that transformers
builds; older runs were named by tokenizer.json alone, which may lack added tokens.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from prefpipe import log
from prefpipe.errors import DataError, IdentityError, PrefpipeError
from prefpipe.ids import canonical_json
from prefpipe.models import fingerprint
from prefpipe.models.tokenizer import load_tokenizer
from prefpipe.runs import store

_FIELD = "vocabularies"  # key in the identity of a manifest; older runs do not have it
Tokens = list[tuple[int, str]]


def read(directory: Path) -> Tokens:
    """(id, token) of every token of the tokenizer of a model, sorted by id. Raises what `load_tokenizer` raises."""
    return of_tokenizer(load_tokenizer(directory).backend)


def of_tokenizer(tokenizer: Tokenizer) -> Tokens:
    """(id, token) of every token of a tokenizer, added ones too, sorted by id."""
    return sorted((number, token) for token, number in tokenizer.get_vocab(with_added_tokens=True).items())


def name(tokens: Tokens, size: int | None = None) -> str:
    """The name of a vocabulary. With `size` only ids below it count: tokens that are added later have no part."""
    kept = [pair for pair in tokens if size is None or pair[0] < size]
    return f"{kept[-1][0] + 1 if kept else 0}:{fingerprint.text_digest(canonical_json(kept))}"


def record(names: Iterable[str]) -> dict[str, list[str]]:
    """The vocabularies of the rows of a run, as an entry of the identity in its manifest."""
    return {_FIELD: sorted(set(names))}


def recorded(run: Path) -> list[str]:
    """The names of the vocabularies of a complete run; empty for a run of a version that did not record them."""
    return store.read_manifest(run)["identity"].get(_FIELD, [])


def of_sources(sources: Iterable[str], tokenizer: Tokenizer) -> list[str]:
    """The names of the vocabularies of several inputs: those recorded in runs; for a file of text, the tokenizer's."""
    names: list[str] = []
    for source in sources:
        names += recorded(Path(source)) if Path(source).is_dir() else [name(of_tokenizer(tokenizer))]
    return names


def check(runs: Sequence[Path], directory: Path) -> None:
    """Raise IdentityError when the token ids of a run are other tokens in the model of `directory`.

    Without a tokenizer that can be loaded from `directory` nothing can be compared, and the log says so.
    """
    named = [(run, theirs) for run in runs for theirs in recorded(run)]
    ours: Tokens | None = None
    for ours in _listings(directory) if named else ():
        named = [(run, theirs) for run, theirs in named if _same_ids(ours, theirs) != theirs]
        if not named:
            return
    if ours is not None:
        run, theirs = named[0]
        raise IdentityError(
            f"{run} was made with another tokenizer than that of {directory}: the same id is another token "
            f"(tokenizer: {theirs} there, {_same_ids(ours, theirs)} here)",
            "train on the model that the rows were made for, or tokenise their texts with this one: "
            "`prefpipe build-pairs --format trl`, then give its trl/*.parquet",
        )
    if named:
        log.warn(f"{directory} has no tokenizer: nobody checks that it has the tokens of the rows")


def _same_ids(tokens: Tokens, theirs: str) -> str:
    """The name of the tokens at those ids that another vocabulary has."""
    return name(tokens, int(theirs.partition(":")[0]))


def _listings(directory: Path) -> Iterator[Tokens]:
    """The tokens of a model: those in its tokenizer.json, which take no time to read and name older runs, then those of
    the tokenizer. Neither where it has none that can be loaded."""
    path = directory / "tokenizer.json"
    if path.is_file():
        yield _of_file(path)
    try:
        yield read(directory)
    except PrefpipeError:
        return


def _of_file(path: Path) -> Tokens:
    tokenizer = fingerprint.read_json(path)
    try:
        listed = tokenizer["model"]["vocab"]
        if isinstance(listed, Mapping):
            tokens = {(number, token) for token, number in listed.items()}
        else:  # Unigram: a list of token and score
            tokens = {(number, token) for number, (token, _) in enumerate(listed)}
        return sorted(tokens | {(added["id"], added["content"]) for added in tokenizer.get("added_tokens", ())})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a tokenizer: {error}", "fetch or save the model again") from error
