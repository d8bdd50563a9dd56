"""Content ids and per-sample seeds. blake2b only, never `hash()`: the same content has the same id everywhere."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return _CANONICAL.encode(value)


def content_id(*parts: object) -> str:
    """A 128-bit id of JSON-serialisable parts, as 32 hex digits."""
    return hashlib.blake2b(canonical_json(parts).encode(), digest_size=16).hexdigest()


def numbered_id(key: str, number: int) -> str:
    """The 128-bit id of one of many things that share a key."""
    return hashlib.blake2b(f"{key}/{number}".encode(), digest_size=16).hexdigest()


def sample_seed(seed: int, prompt_id: str, sample_index: int) -> int:
    """A 63-bit seed that depends on (seed, prompt_id, sample_index) only, never on order, sharding or batch size."""
    key = f"{seed}/{prompt_id}/{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def ids_digest(prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> str:
    """128-bit digest of the exact ids that a log-probability belongs to; the boundary is part of it."""
    (digest,) = ids_digests(prompt_token_ids, [token_ids])
    return digest


def ids_digests(prompt_token_ids: Sequence[int], completions: Iterable[Sequence[int]]) -> Iterator[str]:
    """`ids_digest` of every completion of one prompt, which is hashed once."""
    prompt = hashlib.blake2b(len(prompt_token_ids).to_bytes(8, "little"), digest_size=16)
    prompt.update(array("i", prompt_token_ids))
    for token_ids in completions:
        hasher = prompt.copy()
        hasher.update(array("i", token_ids))
        yield hasher.hexdigest()


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix that all token sequences share."""
    length = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length
