"""Data as JSON and back. The kinds that cross are tested in test_peer, with what becomes of them."""

import json
from collections import deque
from typing import Any

import pytest

from prefpipe.rewards.sandbox.values import MUTABLE, decode, encode, plain, refill


class Lying(int):
    """Says that it equals everything."""

    def __eq__(self, _other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def refuse(value: Any) -> Any:
    raise AssertionError(value)


@pytest.mark.parametrize("value", [0, True, 1 << 70, -0.0, "\ud800", b"\0", [{1: (2, {3})}], {"a": deque([1], 2)}, ...])
def test_values_survive_json(value: Any) -> None:
    again = decode(json.loads(json.dumps(encode(value, refuse))), refuse)
    assert (again, type(again)) == (value, type(value))


def test_other_objects_are_referred_to_wherever_they_stand() -> None:
    other, lying = object(), Lying(3)
    seen: list[Any] = []
    encode([other, {"a": (lying,)}], lambda v: seen.append(v) or len(seen))
    assert [id(v) for v in seen] == [id(other), id(lying)]
    assert type(plain(lying)) is int
    with pytest.raises(TypeError, match="object holds no data"):
        plain(other)


@pytest.mark.parametrize(
    "data", [[], ["int"], ["eval", "1"], ["int", "x"], ["numpy", ["O", [1], "00" * 8, True]], ["bytes", 3]]
)
def test_what_encode_does_not_write_is_an_error(data: Any) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        decode(data, refuse)


@pytest.mark.parametrize("kind", MUTABLE)
def test_refill(kind: type) -> None:
    pairs = issubclass(kind, dict)
    old, new = (kind({1: 1}), kind({2: 2})) if pairs else (kind([1]), kind([2, 3]))
    refill(old, new)
    assert old == new
