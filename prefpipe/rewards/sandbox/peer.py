"""Calls between two processes over two pipes: each end has objects, the other holds a `Remote` for them.

A message is a length and JSON. A call waits for its answer and serves what the other end asks meanwhile. The process
of the tests is `guarded`: it gives away nothing but calls, operators and public attributes of the functions, iterators
and instances that the tests passed on, and no operator of its `Remote` tells the program a value of the tests and
takes the program's word for the result.
"""

import builtins
import contextlib
import io
import json
import operator
import os
import sys
import threading
from collections.abc import Callable
from types import BuiltinFunctionType
from typing import Any

from .remote import Remote, handle_of
from .values import MUTABLE, decode, encode, plain, refill

_MOST_BYTES = 1 << 28
_OPERATORS: dict[str, Callable[..., Any]] = {
    "get": getattr, "set": setattr, "del": delattr, "iter": iter, "next": next, "len": len, "hash": hash, "str": str,
    "repr": repr, "format": format, "bool": bool, "int": int, "float": float, "index": operator.index, "abs": abs,
    "round": round, "neg": operator.neg, "pos": operator.pos, "invert": operator.invert, "reversed": reversed,
    "dir": dir, "item": operator.getitem, "setitem": operator.setitem, "delitem": operator.delitem,
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": operator.truediv, "mod": operator.mod,
    "floordiv": operator.floordiv, "pow": operator.pow, "matmul": operator.matmul, "and": operator.and_,
    "or": operator.or_, "xor": operator.xor, "lshift": operator.lshift, "rshift": operator.rshift,
    "eq": operator.eq, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "contains": operator.contains, "plain": plain, "is_instance": lambda kind, value: isinstance(value, kind),
    "is_subclass": lambda kind, value: issubclass(value, kind),
    "enter": lambda m: type(m).__enter__(m), "exit": lambda m, *how: type(m).__exit__(m, *how),
}  # fmt: skip
_INSIDE = {"get", "set", "del", "dir", "enter", "exit"}  # what could lead from an object of the tests to others


class Gone(BaseException):
    """The other process has ended, or no longer speaks the protocol."""


class Peer:
    """One end. `module` names the classes whose instances a guarded end gives attributes of."""

    def __init__(self, reading: int, writing: int, *, guarded: bool, module: str = "") -> None:
        self.guarded = guarded
        self.offer: Callable[[], dict[str, Any]] = dict  # names that go along with each call
        self.accept: Callable[[dict[str, Any]], object] = len
        self.commands: dict[str, Callable[..., Any]] = {}
        self._reading, self._writing, self._module = reading, writing, module
        self._objects: dict[int, Any] = {}
        self._remotes: dict[int, Any] = {}
        self._exceptions: dict[type, int] = {}
        self._turn = threading.RLock()

    def ask(self, what: str, *arguments: Any, **named: Any) -> Any:
        """What the other end answers. Raises what it raised, and Gone when it ended."""
        with self._turn:
            offered = {k: self._encode(v) for k, v in self.offer().items()} if what == "call" else {}
            given = [[self._encode(a) for a in arguments], {k: self._encode(v) for k, v in named.items()}]
            self._send(["ask", what, *given, offered, sys.stdout is not sys.__stdout__])
            while (message := self._receive())[0] == "ask":
                self._serve(*message[1:])
            _, succeeded, answer, changed, printed = message
            for index, content in changed:
                refill(arguments[index], self._decode(content))
            sys.stdout.write(printed)
            if succeeded:
                return self._decode(answer)
            error = self._exception(*answer)
            if self.guarded and what != "next" and isinstance(error, (StopIteration, StopAsyncIteration)):
                error = RuntimeError(f"the program raised {type(error).__name__}")  # it would end a map() of the tests
            raise error

    def serve(self) -> None:
        """Answer until the other end is gone."""
        with contextlib.suppress(Gone):
            while True:
                with self._turn:
                    self._serve(*self._receive()[1:])

    def close(self) -> None:
        """Let the other end stop serving."""
        os.close(self._writing)

    def _serve(self, what: str, given: list[Any], named: dict[str, Any], offered: dict[str, Any], capture: Any) -> None:
        changed: list[Any] = []
        printed = io.StringIO()
        try:
            self.accept({k: self._decode(v) for k, v in offered.items()})
            arguments = [self._decode(a) for a in given]
            with contextlib.redirect_stdout(printed) if capture else contextlib.nullcontext():
                value = self._apply(what, arguments, {k: self._decode(v) for k, v in named.items()})
            answer = [True, self._encode(value)]
            for index, (before, now) in enumerate(zip(given, arguments, strict=True)):
                if type(now) in MUTABLE and (after := self._encode(now)) != before:
                    changed.append([index, after])
        except Gone:
            raise
        except BaseException as error:
            answer = [False, self._describe(error)]
        self._send(["answer", *answer, changed, printed.getvalue()])

    def _apply(self, what: str, arguments: list[Any], named: dict[str, Any]) -> Any:
        if what in self.commands:
            return self.commands[what](*arguments)
        target, *further = arguments
        if what == "call":
            return target(*further, **named)
        if self.guarded and what in _INSIDE:
            kind = target if what == "get" and isinstance(target, type) else type(target)
            name = str(further[0]) if further else "_"
            replaced = what == "set" and callable(getattr(kind, name, None))
            if what not in ("get", "set") or name.startswith("_") or kind.__module__ != self._module or replaced:
                raise PermissionError(f"the tests do not give away {what!r} of {kind.__name__}")
        return _OPERATORS[what](target, *further)

    def _encode(self, value: Any) -> Any:
        return encode(value, self._refer)

    def _decode(self, data: Any) -> Any:
        return decode(data, self._resolve)

    def _refer(self, value: Any) -> list[Any]:
        if isinstance(value, Remote) and handle_of(value)[0] is self:
            return ["yours", handle_of(value)[1]]
        name = getattr(value, "__name__", "") if isinstance(value, (type, BuiltinFunctionType)) else ""
        if name and getattr(builtins, name, None) is value and (self.guarded or isinstance(value, type)):
            return ["builtin", name]
        if isinstance(value, type) and issubclass(value, BaseException):
            if value in self._exceptions:
                return ["yours", self._exceptions[value]]
            return ["exception", self._keep(value), value.__name__, self._base(value)]
        return ["mine", self._keep(value)]

    def _resolve(self, data: list[Any]) -> Any:
        which, handle, *further = data
        if which == "yours":
            return self._objects[handle]
        if which == "builtin":
            return _builtin(handle, type if self.guarded else object)
        if handle not in self._remotes:
            remote: Any = Remote(self, handle)
            if which == "exception":
                name, base = further
                remote = type(str(name), (_builtin(base, type),), {})
                self._exceptions[remote] = handle
            self._remotes[handle] = remote
        return self._remotes[handle]

    def _keep(self, value: Any) -> int:
        self._objects[id(value)] = value
        return id(value)

    @staticmethod
    def _base(kind: type) -> str:
        return next(k.__name__ for k in kind.__mro__ if getattr(builtins, k.__name__, None) is k)

    def _describe(self, error: BaseException) -> list[Any]:
        try:
            return [self._encode(type(error)), self._encode(list(error.args))]
        except Exception:
            return [["object", ["builtin", self._base(type(error))]], ["list", []]]

    def _exception(self, kind: Any, arguments: Any) -> BaseException:
        raised, given = self._decode(kind), self._decode(arguments)
        try:
            error = raised(*given)
        except TypeError:
            error = raised.__new__(raised)
            error.args = tuple(given)
        return error

    def _send(self, message: list[Any]) -> None:
        content = json.dumps(message).encode()
        try:
            write_all(self._writing, len(content).to_bytes(8, "big") + content)
        except OSError as error:
            raise Gone from error

    def _receive(self) -> list[Any]:
        length = int.from_bytes(read_exactly(self._reading, 8), "big")
        if length > _MOST_BYTES:
            raise Gone
        try:
            message = json.loads(read_exactly(self._reading, length))
            if [len(message), message[0]] not in ([6, "ask"], [5, "answer"]):
                raise Gone
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise Gone from error
        return message


def _builtin(name: str, kind: type) -> Any:
    """A builtin by its name; for the tests only types, since `eval` of what a program returns would run in them."""
    value = getattr(builtins, name)
    if not isinstance(value, kind) or value is type:
        raise TypeError(f"{name} does not cross")
    return value


def read_exactly(descriptor: int, length: int) -> bytes:
    """So many bytes, and none of those that follow. Raises Gone when there are fewer."""
    content = bytearray()
    while len(content) < length:
        try:
            chunk = os.read(descriptor, length - len(content))
        except OSError as error:
            raise Gone from error
        if not chunk:
            raise Gone
        content += chunk
    return bytes(content)


def write_all(descriptor: int, content: bytes) -> None:
    """Write bytes to a pipe, however long."""
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]
