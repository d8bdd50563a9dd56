"""What crosses between the process of the tests and that of the program: data as JSON, by exact type.

Numbers, text, bytes, lists, tuples, sets, dicts, ranges, deques, counters, decimals, fractions, dates and numpy arrays
are rebuilt from what they hold, so that no method of the program comes along. For any other object, `refer` says what
stands for it, and `resolve` what that stands for on the other side.
"""

import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

_SAFE = 1 << 53
_BASES: tuple[Any, ...] = (
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    tuple,
    list,
    set,
    frozenset,
    OrderedDict,
    Counter,
    dict,
)
MUTABLE = (list, set, bytearray, dict, OrderedDict, Counter, deque)

# Type: (what it holds, as data; the type from that).
_PARTS: dict[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    complex: (lambda v: [v.real, v.imag], lambda p: complex(*p)),
    bytes: (lambda v: v.hex(), bytes.fromhex),
    bytearray: (lambda v: v.hex(), bytearray.fromhex),
    range: (lambda v: [v.start, v.stop, v.step], lambda p: range(*p)),
    slice: (lambda v: [v.start, v.stop, v.step], lambda p: slice(*p)),
    tuple: (list, tuple),
    set: (list, set),
    frozenset: (list, frozenset),
    dict: (lambda v: [[k, x] for k, x in v.items()], dict),
    OrderedDict: (lambda v: [[k, x] for k, x in v.items()], OrderedDict),
    Counter: (lambda v: [[k, x] for k, x in v.items()], lambda p: Counter(dict(p))),
    defaultdict: (lambda v: [[k, x] for k, x in v.items()], lambda p: defaultdict(None, p)),
    deque: (lambda v: [list(v), v.maxlen], lambda p: deque(*p)),
    Decimal: (str, Decimal),
    Fraction: (lambda v: [v.numerator, v.denominator], lambda p: Fraction(*p)),
    date: (date.isoformat, date.fromisoformat),
    datetime: (datetime.isoformat, datetime.fromisoformat),
    time: (time.isoformat, time.fromisoformat),
    timedelta: (lambda v: [v.days, v.seconds, v.microseconds], lambda p: timedelta(*p)),
}
_BY_NAME = {kind.__name__: (kind, build) for kind, (_, build) in _PARTS.items()}


def encode(value: Any, refer: Callable[[Any], Any]) -> Any:
    """The JSON value for any object."""
    kind = type(value)
    if value is None or kind in (bool, str, float) or (kind is int and -_SAFE < value < _SAFE):
        return value
    if kind is int:
        return ["int", hex(value)]
    if kind is list:
        return ["list", [encode(v, refer) for v in value]]
    if kind in _PARTS:
        return [kind.__name__, encode(_PARTS[kind][0](value), refer)]
    if value is Ellipsis or value is NotImplemented:
        return [str(value), None]
    numpy = sys.modules.get("numpy")
    if numpy and issubclass(kind, (numpy.ndarray, numpy.generic)) and value.dtype.kind in "biufcSU":
        array = issubclass(kind, numpy.ndarray)
        return ["numpy", [value.dtype.str, list(value.shape), value.tobytes().hex(), array]]
    return ["object", refer(value)]


def decode(data: Any, resolve: Callable[[Any], Any]) -> Any:
    """The object for a JSON value. Raises ValueError, TypeError or KeyError for what `encode` cannot have written."""
    if not isinstance(data, list):
        return data
    tag, parts = data
    if tag == "list":
        return [decode(v, resolve) for v in parts]
    if tag == "object":
        return resolve(parts)
    if tag == "int":
        return int(parts, 16)
    if tag == "numpy":
        return _array(*parts)
    if tag in ("Ellipsis", "NotImplemented"):
        return Ellipsis if tag == "Ellipsis" else NotImplemented
    return _BY_NAME[tag][1](decode(parts, resolve))


def plain(value: Any) -> Any:
    """The data in an instance of a subclass of a type of data, such as a named tuple. Raises TypeError for others."""
    for base in _BASES:
        if isinstance(value, base):
            return base.__str__(value) if base is str else base(value)
    raise TypeError(f"{type(value).__name__} holds no data")


def refill(old: Any, new: Any) -> None:
    """Give a mutable object the content of another of its type."""
    if isinstance(old, (list, bytearray)):
        old[:] = new
    else:
        old.clear()
        (old.extend if isinstance(old, deque) else old.update)(new)


def _array(kind: str, shape: list[int], content: str, array: Any) -> Any:
    import numpy  # noqa: PLC0415  (only programs that use it pay for it)

    dtype = numpy.dtype(kind)
    if dtype.kind not in "biufcSU":
        raise ValueError(f"arrays of {kind} do not cross")
    values = numpy.frombuffer(bytearray.fromhex(content), dtype).reshape(shape)
    return values if array else values[()]
