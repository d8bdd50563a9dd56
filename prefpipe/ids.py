"""Content ids and seeds of samples, by blake2b: the same content has the same id in every process."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)
_FIRST_SLOTS = 256


def canonical_json(value: object) -> str:
    """JSON with sorted keys and without spaces: equal values give equal text."""
    return _CANONICAL.encode(value)


def content_id(*parts: object) -> str:
    """A 128-bit id of JSON-serialisable parts, as 32 hex digits."""
    return hashlib.blake2b(canonical_json(parts).encode(errors="surrogatepass"), digest_size=16).hexdigest()


def numbered_id(key: str, number: int) -> str:
    """The 128-bit id of a key and a number, as 32 hex digits: faster than `content_id` for many ids with one key."""
    return hashlib.blake2b(f"{key}/{number}".encode(), digest_size=16).hexdigest()


def sample_seed(seed: int, prompt_id: str, sample_index: int) -> int:
    """The 63-bit seed of one sample. It depends on the arguments alone, not on order, shards or batch size."""
    key = f"{seed}/{prompt_id}/{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def ids_digest(
    prompt_token_ids: Sequence[int], token_ids: Sequence[int], loss_mask: Sequence[bool] | None = None
) -> str:
    """The digest of a prompt and a completion, 32 hex digits: which token ids a log-prob belongs to.

    The boundary counts: a token that moves from the prompt to the completion changes the digest. So does the mask of
    the tokens that are scored; one that scores them all is the same as none.
    """
    hasher = _hasher(prompt_token_ids)
    hasher.update(_bytes(token_ids))
    if loss_mask is not None and not all(loss_mask):
        hasher.update(array("i", [-1, *loss_mask]))  # no token id is negative
    return hasher.hexdigest()


def ids_digests(prompt_token_ids: Sequence[int], completions: Iterable[Sequence[int]]) -> Iterator[str]:
    """`ids_digest` of every completion of a prompt, all of whose tokens are scored. The prompt is hashed once."""
    prompt = _hasher(prompt_token_ids)
    for token_ids in completions:
        hasher = prompt.copy()
        hasher.update(_bytes(token_ids))
        yield hasher.hexdigest()


def masked_id(*parts: object, loss_mask: Sequence[bool] | None) -> str:
    """The content id of a completion: of `parts` alone where all of its tokens are scored."""
    return content_id(*parts, *([] if loss_mask is None else [list(loss_mask)]))


def _hasher(prompt_token_ids: Sequence[int]) -> "hashlib.blake2b":
    hasher = hashlib.blake2b(len(prompt_token_ids).to_bytes(8, "little"), digest_size=16)
    hasher.update(_bytes(prompt_token_ids))
    return hasher


def _bytes(token_ids: Sequence[int]) -> "array[int] | memoryview[int]":
    """Token ids as integers of 32 bits; a memoryview holds such already."""
    return token_ids if isinstance(token_ids, memoryview) else array("i", token_ids)


class IdSet:
    """A growing set of content ids in 24 to 48 bytes each, where a Python set takes 123.

    An open-addressing hash table in one array: a slot holds the two 64-bit halves of an id, and at most two slots of
    three are in use.
    """

    def __init__(self) -> None:
        self._halves = array("Q", [0]) * (2 * _FIRST_SLOTS)
        self._count = 0

    def add(self, key: str) -> bool:
        """Add an id (32 hex digits); False when the set has it already."""
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

    def __contains__(self, key: str) -> bool:
        """Whether the set has an id."""
        slot = _slot(self._halves, int(key[:16], 16), int(key[16:], 16))
        return bool(self._halves[2 * slot] or self._halves[2 * slot + 1])


def _insert(halves: "array[int]", high: int, low: int) -> bool:
    """Write an id into its slot; False when it stands there already."""
    slot = _slot(halves, high, low)
    if halves[2 * slot] or halves[2 * slot + 1]:
        return False
    halves[2 * slot], halves[2 * slot + 1] = high, low
    return True


def _slot(halves: "array[int]", high: int, low: int) -> int:
    """The slot that holds an id, else the first free one at or after slot `low % slots`.

    A free slot is two zeros. The id of zeros alone would look like one, but no digest is zero in practice.
    """
    slots = len(halves) // 2
    slot = low % slots
    while (halves[2 * slot] or halves[2 * slot + 1]) and (halves[2 * slot] != high or halves[2 * slot + 1] != low):
        slot = (slot + 1) % slots
    return slot


def common_prefix(sequences: Sequence[Sequence[object]]) -> int:
    """Length of the longest prefix that all sequences (of token ids, or texts) share."""
    length = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length
