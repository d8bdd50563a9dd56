"""What tests may do with a program in another process, as if it were in their namespace. Here both are threads."""

import os
import threading
from collections.abc import Iterator

import pytest

from prefpipe.rewards.sandbox import judge
from prefpipe.rewards.sandbox.peer import Gone, Peer

PROGRAM = """
import collections, copy, dataclasses, enum, heapq, math
from collections import Counter, deque, namedtuple
from fractions import Fraction
from heapq import heappush

class Stack:
    made = 0
    def __init__(self): self.items = []; Stack.made += 1
    def push(self, x): self.items.append(x); return self
    def pop(self):
        if not self.items: raise Empty("nothing", 3)
        return self.items.pop()
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __getitem__(self, i): return self.items[i]
    def __setitem__(self, i, x): self.items[i] = x
    def __delitem__(self, i): del self.items[i]
    def __enter__(self): return self
    def __exit__(self, *how): self.items.clear(); return False

class Empty(LookupError): pass
class Colour(enum.Enum): RED = 1
class Level(enum.IntEnum): LOW = 3
Point = namedtuple("Point", "x y")

@dataclasses.dataclass(frozen=True, order=True)
class Vector:
    x: int
    y: int
    def __add__(self, o): return Vector(self.x + o.x, self.y + o.y)
    def __mul__(self, k): return Vector(self.x * k, self.y * k)
    __rmul__ = __mul__
    def __neg__(self): return Vector(-self.x, -self.y)
    def __abs__(self): return math.hypot(self.x, self.y)

def same(x, *more, **named): return x
def twice(f, x): return f(f(x))
def count():
    for i in range(3): yield i
def fail(kind): raise kind("said", 5)
def sort_in_place(xs): xs.sort()
def rotate(grid): grid[:] = [list(r) for r in zip(*grid[::-1])]
def build(values):
    head = None
    for v in reversed(values):
        node = Node(v); node.next = head; head = node
    return head
def total(node):
    n = 0
    while node: n += node.val; node = node.next
    return n
def is_node(node): return isinstance(node, Node)
def kind_of(x): return type(x)
def convert(x, kind): return kind(x)
def plus(x, y): return x + y
def greet(): print("hello")
counter = 0
def tick():
    global counter
    counter += 1
def deep(n): return n if n == 0 else deep(n - 1)
"""
NODE = "class Node:\n    def __init__(self, val): self.val = val; self.next = None\n"


@pytest.fixture
def pair() -> Iterator[Peer]:
    asked, asking = os.pipe()
    answered, answering = os.pipe()
    there = Peer(asked, answering, guarded=False)
    thread = threading.Thread(target=judge.serve, args=(there, PROGRAM, None), kwargs={"script": False})
    thread.start()
    here = Peer(answered, asking, guarded=True, module="program")
    assert here.ask("run") is None
    yield here
    here.close()
    thread.join()


@pytest.mark.parametrize(
    "tests",
    [
        *(f"v = {v}\nassert same(v) == v and type(same(v)) is type(v)" for v in (
            "None", "True", "1", "-(1 << 200)", "10 ** 5000", "1.5", "float('inf')", "2j", "'a\\ud800'", "b'\\xff'",
            "bytearray(b'x')", "[1, [2]]", "(1, 'a')", "{1: [2], 'a': (3,)}", "{1, 2}", "frozenset({1})", "range(3)",
            "slice(1, 2)", "deque([1], 4)", "Counter('aab')", "Fraction(1, 3)", "collections.OrderedDict(a=1)", "...",
        )),
        "from datetime import *\nfor v in (date(2020, 1, 2), datetime(2020, 1, 2, 3, tzinfo=timezone.utc), time(3), "
        "timedelta(1, 2)):\n    assert same(v) == v",
        "from decimal import Decimal\nassert same(Decimal('1.10')) == Decimal('1.10')",
        "x = same(float('nan'))\nassert x != x",
        "s = Stack()\ns.push(1).push('a')\nassert len(s) == 2 and s.pop() == 'a' and list(s) == [1] and 1 in s",
        "s = Stack().push(1)\ns[0] = 5\nassert s[0] == 5 and s[-1] == 5\ndel s[0]\nassert not s and s.items == []",
        "assert isinstance(Stack(), Stack) and not isinstance(Vector(1, 2), Stack) and not isinstance(1, Stack)",
        "made = Stack.made\nStack()\nassert Stack.made == made + 1",
        "with Stack() as s:\n    s.push(1)\n    assert len(s) == 1\nassert len(s) == 0",
        "try:\n    Stack().pop()\n    assert False\nexcept Empty as e:\n    assert e.args == ('nothing', 3)",
        "try:\n    Stack().pop()\n    assert False\nexcept LookupError:\n    pass",
        "try:\n    fail(KeyError)\n    assert False\nexcept KeyError as e:\n    assert e.args == ('said', 5)",
        "class Mine(Exception): pass\ntry:\n    fail(Mine)\n    assert False\nexcept Mine:\n    pass",
        "import unittest\nwith unittest.TestCase().assertRaises(Empty):\n    Stack().pop()",
        "try:\n    same(1).x\n    assert False\nexcept AttributeError:\n    pass",
        "assert Vector(1, 2) == Vector(1, 2) != Vector(2, 1) and Vector(1, 2) < Vector(2, 1)",
        "assert Vector(1, 2) + Vector(1, 1) == Vector(2, 3) and -Vector(1, 2) == Vector(-1, -2)",
        "assert Vector(1, 2) * 3 == Vector(3, 6) == 3 * Vector(1, 2) and abs(Vector(3, 4)) == 5.0",
        "assert (Vector(1, 2) * 3).x == 3 and str(Vector(1, 2)) == 'Vector(x=1, y=2)'",
        "assert {Vector(1, 2), Vector(1, 2)} == {Vector(1, 2)} and {Vector(1, 2): 3}[Vector(1, 2)] == 3",
        "p = Point(1, 2)\nassert p == (1, 2) and p.x == 1 and p[1] == 2 and list(p) == [1, 2] and p != (2, 1)",
        "assert Colour.RED is Colour.RED and Colour(1) == Colour.RED and Colour.RED != 1 and Colour.RED.value == 1",
        "assert Level.LOW == 3 and 2 < Level.LOW < 4 and Level.LOW + 1 == 4 and [1, 2, 3][Level.LOW - 1] == 3",
        "assert twice(lambda x: x + 1, 3) == 5 and twice(same, 3) == 3 and list(map(same, [1, 2])) == [1, 2]",
        "def bad(x): raise ValueError('mine')\ntry:\n    twice(bad, 1)\n    assert False\nexcept ValueError as e:\n"
        "    assert str(e) == 'mine'",
        "assert list(count()) == [0, 1, 2] and sum(count()) == 3 and 2 in count()\ng = count()\nassert next(g) == 0",
        "xs = [3, 1, 2]\nsort_in_place(xs)\nassert xs == [1, 2, 3]",
        "g = [[1, 2], [3, 4]]\nrotate(g)\nassert g == [[3, 1], [4, 2]]",
        NODE + "head = build([1, 2, 3])\nassert isinstance(head, Node) and head.next.val == 2 and total(head) == 6",
        NODE + "assert is_node(Node(1)) and not is_node(3)",
        "assert kind_of(1) is int and convert('1', int) == 1 and convert([2, 1], sorted) == [1, 2]",
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\nassert plus(P(1, 2), (3,)) == (1, 2, 3)",
        NODE + "n = Node(1)\nassert same(n) is n",
        "import io, contextlib\nout = io.StringIO()\nwith contextlib.redirect_stdout(out):\n    greet()\n"
        "assert out.getvalue() == 'hello\\n'",
        "n = counter\ntick()\nassert counter == n + 1",
        "assert math.sqrt(4) == 2 and heapq.nlargest(1, [1, 2]) == [2] and copy.copy([1]) == [1]",
        "h = []\nheappush(h, 1)\nassert h == [1] and Counter([1]) == {1: 1}",
        "assert same.__name__ == 'same' and callable(same) and hasattr(Stack, 'push') and not hasattr(Stack, 'peek')",
        "assert isinstance(Point(1, 2), tuple) and isinstance(Level.LOW, int) and not isinstance(Vector(1, 2), int)",
        "assert f'{Vector(1, 2)}' == 'Vector(x=1, y=2)' and f'{Level.LOW:03}' == '003' and Stack.__doc__ is None",
        "assert issubclass(Empty, LookupError) and eval('same(1)') == 1",
        "def check(candidate):\n    assert candidate(1) == 1\ncheck(same)",
        "try:\n    deep(10 ** 5)\n    assert False\nexcept RecursionError:\n    pass",
        "try:\n    nobody\n    assert False\nexcept NameError:\n    pass",
        "class T:\n    def f(self): return same(3)\nassert T().f() == 3",
        "assert len({id(f) for f in (Stack.push, Stack.push)}) == 1 and same(1, *[2], a=3) == 1",
    ],
)  # fmt: skip
def test_tests_in_another_process_mean_what_they_say(pair: Peer, tests: str) -> None:
    assert judge.run_tests(pair, tests) is None


def test_arrays_cross_as_data(pair: Peer) -> None:
    pytest.importorskip("numpy")
    assert judge.run_tests(pair, "assert np.sqrt(4) == 2") is None, "as of the tests, without their import"
    tests = (
        "import numpy as np\n"
        "for v in (np.arange(6).reshape(2, 3), np.zeros(0), np.array(['a', 'bc']), np.float32(2)):\n"
        "    assert (same(v) == v).all() and same(v).dtype == v.dtype and same(v).shape == v.shape\n"
        "x = same(np.zeros(2))\nx[0] = 1\nassert same(np.int64(3)) == 3"
    )
    assert judge.run_tests(pair, tests) is None


@pytest.mark.parametrize(
    ("tests", "failure"),
    [
        ("assert same(1) == 2, same('why')", "tests: AssertionError: why"),
        ("fail(ZeroDivisionError)", "tests: ZeroDivisionError: ('said', 5)"),
        ("same(1", "tests: SyntaxError: '(' was never closed (tests, line 1)"),
        ("nobody(1)", "tests: NameError: name 'nobody' is not defined"),
        ("raise SystemExit(0)", "tests: ended with exit code 0"),
        ("class S(Stack): pass", "tests: TypeError: tests cannot derive a class from one of the program"),
        ("all(map(lambda v: fail(StopIteration), [1]))", "tests: RuntimeError: the program raised StopIteration"),
        ("fail(SystemExit)", "tests: ended with exit code ('said', 5)"),
    ],
)
def test_failures_are_named(pair: Peer, tests: str, failure: str) -> None:
    assert judge.run_tests(pair, tests) == failure


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 3, (1 << 40).to_bytes(8, "big"), *(len(c).to_bytes(8, "big") + c for c in (b"[", b"{}", b"[]", b"1",
     b'["answer"]', b"[" * 9999, b'["ask", "run"]'))],
)  # fmt: skip
def test_what_is_no_message_ends_the_tests(content: bytes) -> None:
    answered, answering = os.pipe()
    asked, asking = os.pipe()
    os.write(answering, content)
    os.close(answering)
    with pytest.raises(Gone):
        Peer(answered, asking, guarded=True).ask("run")
    for descriptor in (answered, asked, asking):
        os.close(descriptor)
