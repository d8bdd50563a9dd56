"""Prompts to drop, with their reason: duplicates, near duplicates, and texts of a benchmark."""

from collections.abc import Iterator
from pathlib import Path

import polars as pl
from rensa import RMinHash, RMinHashLSH  # type: ignore[attr-defined]  # a compiled module without stubs

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.inputs import files
from prefpipe.stages.build_pairs.texts import conversation, folded, ngrams, words

_PERMUTATIONS = 128
# 32 bands of 4 rows: two prompts of similarity 0.5 are compared with probability 0.87, of 0.8 with 1 - 5e-8.
_BANDS = 32
_SHINGLE = 3
SCHEMA = {"prompt_id": pl.String, "reason": pl.String, "detail": pl.String}


def dropped_prompts(prompts: pl.LazyFrame, config: BuildPairsConfig) -> pl.DataFrame:
    """prompt_id, reason and detail of every prompt to drop. Among equal prompts the first by prompt_id stays.

    `prompts` has prompt_id and messages; a prompt may have several rows. Raises MissingInputError, UsageError or
    DataError for a benchmark file that cannot be read.
    """
    dropped = [pl.DataFrame(schema=SCHEMA)]
    if config.duplicate_prompts == "drop":
        dropped.append(duplicates(prompts))
    if config.near_duplicate_prompts or config.contamination:
        texts = prompts.select("prompt_id", text=conversation("messages")).unique("prompt_id").sort("prompt_id")
        frame = texts.collect(engine="streaming").join(dropped[-1], on="prompt_id", how="anti", maintain_order="left")
        if config.contamination:
            known = benchmark_ngrams([Path(p) for p in config.contamination], config.contamination_ngram)
            dropped.append(contaminated(frame, known, config.contamination_ngram))
            frame = frame.join(dropped[-1], on="prompt_id", how="anti", maintain_order="left")
        if config.near_duplicate_prompts:
            dropped.append(near_duplicates(frame, config.near_duplicate_prompts))
    return pl.concat(dropped)


def duplicates(prompts: pl.LazyFrame) -> pl.DataFrame:
    """Prompts whose text equals that of another prompt up to case, spaces and Unicode composition."""
    return (
        prompts.select("prompt_id", text=folded(conversation("messages")).hash())
        .group_by("text")
        .agg(pl.col("prompt_id").unique())
        .filter(pl.col("prompt_id").list.len() > 1)
        .with_columns(first=pl.col("prompt_id").list.min())
        .explode("prompt_id")
        .filter(pl.col("prompt_id") != pl.col("first"))
        .select("prompt_id", reason=pl.lit("duplicate_prompt"), detail=pl.format("same text as {}", "first"))
        .sort("prompt_id")
        .collect(engine="streaming")
    )


def near_duplicates(prompts: pl.DataFrame, similarity: float) -> pl.DataFrame:
    """Prompts whose word 3-grams have a Jaccard similarity of at least `similarity` with those of an earlier prompt
    that stays.

    `prompts` has prompt_id and text, in order. The similarity is estimated by MinHash with 128 permutations (standard
    error at most 0.044), for the candidates of locality-sensitive hashing.
    """
    index = RMinHashLSH(similarity, _PERMUTATIONS, _BANDS)
    kept: list[tuple[str, RMinHash]] = []
    dropped: list[tuple[str, str, str]] = []
    for prompt_id, text in prompts.select("prompt_id", "text").iter_rows():
        sketch = RMinHash(_PERMUTATIONS, 0)
        sketch.update(sorted(ngrams(words(text), _SHINGLE)))
        near = ((kept[i][1].jaccard(sketch), -i) for i in index.query(sketch))
        best, place = max(near, default=(0.0, 0))
        if best >= similarity:
            dropped.append((prompt_id, "near_duplicate_prompt", f"similarity {best:.2f} with {kept[-place][0]}"))
        else:
            index.insert(len(kept), sketch)
            kept.append((prompt_id, sketch))
    return pl.DataFrame(dropped, schema=SCHEMA, orient="row")


def contaminated(prompts: pl.DataFrame, known: set[str], n: int) -> pl.DataFrame:
    """Prompts (prompt_id, text) that share a word n-gram with a benchmark."""
    dropped: list[tuple[str, str, str]] = []
    for prompt_id, text in prompts.select("prompt_id", "text").iter_rows():
        # A turn begins with its role, which a benchmark lacks: compare without the roles, then the whole text.
        shared = {g for turn in text.split("\n") for g in ngrams(words(turn.partition(": ")[2] or turn), n)} & known
        if not shared:
            shared = ngrams(words(text), n) & known
        if shared:
            dropped.append((prompt_id, "contaminated", f"shares with a benchmark: {min(shared)}"))
    return pl.DataFrame(dropped, schema=SCHEMA, orient="row")


def benchmark_ngrams(paths: list[Path], n: int) -> set[str]:
    """The word n-grams of every text in these files. Raises MissingInputError, UsageError, DataError."""
    return {gram for path in paths for text in _texts(path) for gram in ngrams(words(text), n)}


def _texts(path: Path) -> Iterator[str]:
    if path.suffix == ".txt" and path.is_file():
        yield from path.read_text(encoding="utf-8").splitlines()
        return
    for _, value in files.values(path):
        yield from _strings(value)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
