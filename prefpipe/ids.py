"""Content ids and per-sample seeds. blake2b only, never `hash()`: the same content has the same id everywhere."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)
_FIRST_SLOTS = 256


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


class IdSet:
    """A growing set of content ids, 24 to 48 bytes each (a Python set of them takes 123): open addressing in one array,
    two 64-bit halves to a slot, at most two slots of three in use."""

    def __init__(self) -> None:
        self._halves = array("Q", [0]) * (2 * _FIRST_SLOTS)
        self._count = 0

    def add(self, key: str) -> bool:
        """Put an id (32 hex digits) in; False when it is there already."""
        if not _insert(self._halves, int(key[:16], 16), int(key[16:], 16)):
            return False
        self._count += 1
        if 3 * self._count > len(self._halves):
            larger = array("Q", [0]) * (2 * len(self._halves))
            for place in range(0, len(self._halves), 2):
                if self._halves[place] or self._halves[place + 1]:
                    _insert(larger, self._halves[place], self._halves[place + 1])
            self._halves = larger
        return True


def _insert(halves: "array[int]", high: int, low: int) -> bool:
    """Put an id into the first free slot from its own place on; False when it is there already. An id of nothing but
    zeros, which no digest gives in practice, would count as a free slot."""
    slots = len(halves) // 2
    slot = low % slots
    while halves[2 * slot] or halves[2 * slot + 1]:
        if halves[2 * slot] == high and halves[2 * slot + 1] == low:
            return False
        slot = (slot + 1) % slots
    halves[2 * slot], halves[2 * slot + 1] = high, low
    return True


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix that all token sequences share."""
    length = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length
