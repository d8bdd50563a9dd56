"""The stand-in for an object of the other process."""

import operator
from typing import Any

_BINARY = ("add", "sub", "mul", "truediv", "mod", "floordiv", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
_TO_NUMBERS = ("int", "float", "index", "abs", "round")
_TO_OBJECTS = ("neg", "pos", "invert")


class Remote:
    """Every operation is one of the object itself, in its process.

    On a guarded end, the result of an operator must not depend on the program's word about a value of the tests: one
    that returns whatever is expected would pass. Comparisons with data, and `in`, compare the data that the object
    holds, here. Arithmetic with data yields an object whose value as a number or truth is refused.
    """

    __slots__ = ("_handle", "_peer", "_shown")

    def __init__(self, peer: Any, handle: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_handle", handle)
        object.__setattr__(self, "_shown", False)

    def __getattr__(self, name: str) -> Any:
        return _ask(self, "get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "set", name, value)

    def __delattr__(self, name: str) -> None:
        _ask(self, "del", name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call the object there."""
        return handle_of(self)[0].ask("call", self, *arguments, **named)

    def __iter__(self) -> Any:
        return iter(_Steps(_number(self, "iter")))

    def __next__(self) -> Any:
        return _number(self, "next")

    def __reversed__(self) -> Any:
        return _number(self, "reversed")

    def __len__(self) -> Any:
        return _number(self, "len")

    def __bool__(self) -> bool:
        return bool(_number(self, "bool"))

    def __hash__(self) -> Any:
        return _ask(self, "hash")

    def __str__(self) -> Any:
        return _ask(self, "str")

    def __repr__(self) -> Any:
        return _ask(self, "repr")

    def __format__(self, how: str) -> Any:
        return _ask(self, "format", how)

    @property
    def __class__(self) -> type:  # type: ignore[override]  # so that a named tuple is an instance of tuple
        return Remote if (held := _plain(self)) is None else type(held)

    def __mro_entries__(self, bases: Any) -> Any:
        raise TypeError("tests cannot derive a class from one of the program")

    def __dir__(self) -> Any:
        return _ask(self, "dir")

    def __getitem__(self, key: Any) -> Any:
        return _ask(self, "item", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _ask(self, "setitem", key, value)

    def __delitem__(self, key: Any) -> None:
        _ask(self, "delitem", key)

    def __contains__(self, value: Any) -> bool:
        if not handle_of(self)[0].guarded:
            return bool(_ask(self, "contains", value))
        held = _plain(self)
        return value in held if held is not None else any(value == v for v in self)

    def __enter__(self) -> Any:
        return _ask(self, "enter")

    def __exit__(self, *how: Any) -> Any:
        return _ask(self, "exit", None, None, None) if how[0] is None else _ask(self, "exit", how[0], None, None)

    def __instancecheck__(self, value: Any) -> bool:
        return bool(_ask(self, "is_instance", value))

    def __subclasscheck__(self, kind: Any) -> bool:
        return bool(_ask(self, "is_subclass", kind))

    def __eq__(self, other: object) -> bool:
        return bool(_compare(self, "eq", other))

    def __ne__(self, other: object) -> bool:
        return not self == other


class _Steps:
    """An iterator of the other process, as an iterator of this one."""

    def __init__(self, remote: Any) -> None:
        self._next = remote.__next__

    def __iter__(self) -> "_Steps":
        return self

    def __next__(self) -> Any:
        return self._next()


def handle_of(remote: Remote) -> tuple[Any, int]:
    """The end that it belongs to, and the number of the object there."""
    return object.__getattribute__(remote, "_peer"), object.__getattribute__(remote, "_handle")


def _ask(remote: Remote, what: str, *arguments: Any) -> Any:
    return handle_of(remote)[0].ask(what, remote, *arguments)


def _number(remote: Remote, what: str, *digits: int) -> Any:
    if object.__getattribute__(remote, "_shown"):
        raise TypeError(f"{what}: this object has seen a value of the tests, so that its value cannot be trusted")
    return _ask(remote, what, *digits)


def _plain(remote: Remote) -> Any:
    try:
        return _ask(remote, "plain")
    except TypeError:
        return None


def _compare(left: Remote, what: str, right: Any) -> Any:
    peer, handle = handle_of(left)
    if isinstance(right, Remote):
        return (what == "eq" and handle_of(right) == (peer, handle)) or _ask(left, what, right)
    if not peer.guarded:
        return _ask(left, what, right)
    if object.__getattribute__(left, "_shown") or (held := _plain(left)) is None:
        return False if what == "eq" else NotImplemented
    return getattr(operator, what)(held, right)


def _combine(left: Any, what: str, right: Any) -> Any:
    """The operation on an object and anything: with data alone where the object holds data."""
    remote = left if isinstance(left, Remote) else right
    peer, other = handle_of(remote)[0], right if remote is left else left
    if not peer.guarded or (isinstance(other, Remote) and not _shown(left) and not _shown(right)):
        return peer.ask(what, left, right)
    if (held := _plain(remote)) is not None and not isinstance(other, Remote) and not _shown(remote):
        function = getattr(operator, what + "_" if what in ("and", "or") else what)
        return function(held, right) if remote is left else function(left, held)
    result = peer.ask(what, left, right)
    if not isinstance(result, Remote):
        raise TypeError(f"{what}: the result of an object and a value of the tests must be an object")
    object.__setattr__(result, "_shown", True)
    return result


def _shown(value: Any) -> bool:
    return object.__getattribute__(value, "_shown")


def _method(function: Any, what: str) -> Any:
    return lambda self, *other: function(self, what, *other)


Remote.__doc__ = property(lambda self: _ask(self, "get", "__doc__"))  # type: ignore[assignment]  # text, by its type
for _name in _BINARY:
    setattr(Remote, f"__{_name}__", _method(_combine, _name))
    setattr(Remote, f"__r{_name}__", lambda self, other, _name=_name: _combine(other, _name, self))
for _name in ("lt", "le", "gt", "ge"):
    setattr(Remote, f"__{_name}__", _method(_compare, _name))
for _name in _TO_NUMBERS + _TO_OBJECTS:
    setattr(Remote, f"__{_name}__", _method(_number, _name))
