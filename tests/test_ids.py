"""The same content has the same id in every process, and other content has another."""

import hashlib
import json
import os
import struct
import subprocess
import sys
import tracemalloc

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prefpipe.ids import IdSet, canonical_json, content_id, ids_digest, ids_digests, masked_id, numbered_id, sample_seed
from tests.conftest import ROOT

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)
TOKENS = st.lists(st.integers(min_value=0, max_value=2**31 - 1), max_size=12)


@given(value=JSON)
def test_canonical_json_keeps_the_value_and_is_a_fixed_point(value: object) -> None:
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text


@given(value=st.dictionaries(TEXT, st.integers(), max_size=6))
def test_key_order_does_not_change_an_id(value: dict[str, int]) -> None:
    turned = dict(reversed(value.items()))
    assert content_id(value) == content_id(turned)


def test_canonical_json_has_sorted_keys_no_spaces_and_plain_letters() -> None:
    assert canonical_json({"b": [1, 2], "a": "ä"}) == '{"a":"ä","b":[1,2]}'


def test_content_id_is_blake2b_of_the_parts() -> None:
    assert content_id("a", 1) == hashlib.blake2b(b'["a",1]', digest_size=16).hexdigest()


@given(first=st.lists(JSON, max_size=3), second=st.lists(JSON, max_size=3))
def test_other_parts_have_another_id(first: list[object], second: list[object]) -> None:
    assume(canonical_json(first) != canonical_json(second))
    assert content_id(*first) != content_id(*second)


def test_part_boundaries_count() -> None:
    assert len({content_id("ab", "c"), content_id("a", "bc"), content_id("abc"), content_id("a", "b", "c")}) == 4


@given(seed=st.integers(min_value=0), prompt_id=TEXT, index=st.integers(min_value=0))
def test_a_sample_seed_has_63_bits(seed: int, prompt_id: str, index: int) -> None:
    assert 0 <= sample_seed(seed, prompt_id, index) < 2**63


def test_a_sample_seed_depends_on_each_of_its_parts() -> None:
    seeds = {sample_seed(s, p, i) for s in range(5) for p in ("p", "q", "1/p") for i in range(12)}
    assert len(seeds) == 5 * 3 * 12


def test_ids_digest_is_blake2b_of_length_and_int32_ids() -> None:
    raw = struct.pack("<Qiii", 1, 7, 8, 9)
    assert ids_digest([7], [8, 9]) == hashlib.blake2b(raw, digest_size=16).hexdigest()


@given(prompt=TOKENS, completion=TOKENS, cut=st.integers(min_value=0, max_value=24))
def test_moving_the_boundary_changes_the_digest(prompt: list[int], completion: list[int], cut: int) -> None:
    together = prompt + completion
    cut = min(cut, len(together))
    assume(cut != len(prompt))
    assert ids_digest(prompt, completion) != ids_digest(together[:cut], together[cut:])


@settings(max_examples=50)
@given(tokens=st.lists(st.integers(min_value=0, max_value=10**6), min_size=1, max_size=12), data=st.data())
def test_one_other_token_changes_the_digest(tokens: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(min_value=0, max_value=len(tokens) - 1))
    other = [*tokens]
    other[place] += 1
    assert ids_digest([], tokens) != ids_digest([], other)
    assert ids_digest(tokens, [1]) != ids_digest(other, [1])


def test_ids_do_not_depend_on_the_hash_seed_of_the_process() -> None:
    values = "content_id({'b': 1, 'a': ['x']}), sample_seed(1, 'p', 2), ids_digest([1], [2])"
    code = f"from prefpipe.ids import *; print({values})"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    expected = f"{content_id({'a': ['x'], 'b': 1})} {sample_seed(1, 'p', 2)} {ids_digest([1], [2])}\n"
    assert printed == {expected}


def test_numbered_ids_differ_by_key_and_number() -> None:
    """By hand: blake2b of "key/number", 128 bits."""
    assert numbered_id("ab", 3) == hashlib.blake2b(b"ab/3", digest_size=16).hexdigest()
    assert len({numbered_id(key, n) for key in ("a", "b") for n in range(5)}) == 10


@given(prompt=TOKENS, completions=st.lists(TOKENS, max_size=4))
def test_digests_of_one_prompt_are_those_of_each(prompt: list[int], completions: list[list[int]]) -> None:
    assert list(ids_digests(prompt, completions)) == [ids_digest(prompt, ids) for ids in completions]


@given(prompt=TOKENS, ids=TOKENS, mask=st.lists(st.booleans(), max_size=8))
def test_the_mask_of_scored_tokens_is_part_of_the_digest(prompt: list[int], ids: list[int], mask: list[bool]) -> None:
    """One that scores every token is none: digests of rows without a mask are as they were."""
    assert (ids_digest(prompt, ids, mask) == ids_digest(prompt, ids)) == all(mask)
    others = [*mask[:-1], not mask[-1]] if mask else [False]
    assert ids_digest(prompt, ids, mask) != ids_digest(prompt, ids, others)


def test_a_mask_gives_a_completion_another_id() -> None:
    assert masked_id([1], "import", loss_mask=None) == content_id([1], "import")
    ids = {masked_id([1], "import", loss_mask=mask) for mask in (None, [True, False], [False, True])}
    assert len(ids) == 3


@given(keys=st.lists(st.integers(1, 40).map(lambda n: f"{n % 3:016x}{n * 256 + n % 2:016x}"), max_size=60))
def test_a_set_of_ids_is_a_set(keys: list[str]) -> None:
    """Ids that want the same slot, or share a half, as digests hardly ever do."""
    found, expected = IdSet(), set[str]()
    for key in keys:
        assert found.add(key) == (key not in expected)
        expected.add(key)


def test_a_set_of_ids_grows_and_stays_small() -> None:
    keys = [content_id(i) for i in range(9000)]
    tracemalloc.start()
    found = IdSet()
    assert all(found.add(key) for key in keys)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert not any(found.add(key) for key in keys)
    assert size < 50 * len(keys)
