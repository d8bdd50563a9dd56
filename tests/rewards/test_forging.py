"""Programs that know the harness and do not compute: none of them has a reward."""

import pytest

from prefpipe.config.rewards import Code
from prefpipe.rewards import sandbox
from prefpipe.rewards.base import Answer, Scored
from prefpipe.rewards.code_tests import code
from prefpipe.schemas import Message

QUESTION = [Message(role="user", content="?")]
TESTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0"
WRONG = "def add(a, b):\n    return 7\n"
EVIL = """class Evil:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __bool__(self): return True
    def __contains__(self, other): return True
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
    def __sub__(self, other): return 0
    __rsub__ = __add__ = __radd__ = __mul__ = __rmul__ = __sub__
    def __call__(self, *given): return self
    def __getattr__(self, name): return self
"""
VERDICTS = """import os
for descriptor in range(0, 64):
    for text in (b'["ok", null]', b'cannot isolate: x', b'ok', bytes(7) + b'\\x00'):
        try:
            os.write(descriptor, text)
        except OSError:
            pass
"""
ANSWERS = """import json, os
def answer(value):
    content = json.dumps(["answer", True, value, [], ""]).encode()
    return len(content).to_bytes(8, "big") + content
"""
EXITS = "__import__('os')._exit(3)"
strict = pytest.mark.skipif(sandbox.supported() is not None, reason=str(sandbox.supported()))


def rate(program: str, tests: str = TESTS, isolation: str = "strict") -> Scored:
    (scored,) = code(Code(timeout_seconds=20, memory_mib=256, isolation=isolation))([Answer(QUESTION, program, tests)])
    return scored


FORGED = {
    "exec": "import builtins\nbuiltins.exec = lambda *given: None",
    "compile": "import builtins\ncompiled = compile('pass', 'x', 'exec')\nbuiltins.compile = lambda *given: compiled",
    "every builtin": "import builtins as b\nfor n in dir(b):\n    if n[0] != '_': setattr(b, n, lambda *g, **k: 0)",
    "AssertionError": "import builtins\nbuiltins.AssertionError = SystemExit",
    "json": "import json\njson.dumps = lambda *given: '[\"ok\", null]'\njson.loads = lambda *given: ['ok', None]",
    "os.write": "import os\nwrite = os.write\nos.write = lambda d, c: write(d, b'[\"ok\", null]')",
    "os._exit": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "an exit handler": "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit(0)",
    "an exit in a function": "import os\ndef add(a, b): os._exit(0)",
    "the verdict": VERDICTS,
    "the verdict, and an exit": f"{VERDICTS}os._exit(0)",
    "the verdict in a function": f"def add(a, b):\n    {VERDICTS.replace(chr(10), chr(10) + '    ')}\n    os._exit(0)",
    "answers": (
        f"{ANSWERS}for d in range(3, 20):\n    try: os.write(d, answer(None))\n    except OSError: pass\nos._exit(0)"
    ),
    "cannot isolate": "raise OSError('cannot isolate: x')",
    "frames": (
        "import sys\nframe = sys._getframe()\nwhile frame:\n"
        "    for held in (frame.f_locals, frame.f_globals):\n"
        "        for name in ('token', 'tests', 'verdict', 'job'):\n"
        "            if name in held: held[name] = 'ok'\n"
        "    frame = frame.f_back"
    ),
    "modules": "import sys\nfor n, m in list(sys.modules.items()):\n    if n.startswith('sandbox'): vars(m).clear()",
    "gc": (
        "import gc\nfor o in gc.get_objects():\n"
        "    if type(o).__name__ == 'Peer': o._apply = lambda *given: 3\n"
        "    if type(o) is dict and 'tests' in o: o['tests'] = ''"
    ),
    "a trace": "import sys, threading\nsys.settrace(lambda *given: None)\nthreading.settrace(lambda *given: None)",
    "a thread": "import os, threading, time\nthreading.Thread(target=lambda: (time.sleep(0.2), os._exit(0))).start()",
    "an import hook": "import sys\nsys.meta_path.insert(0, type('F', (), {'find_spec': lambda *g: os._exit(0)})())",
    "sys.modules": "import sys, types\nsys.modules.update(math=types.ModuleType('math'), json=None)",
    "faulthandler": "import os\nfrom faulthandler import *\nfor d in (3, 4, 5, 6): dump_traceback(d)\nos._exit(0)",
    "excepthook": "import os, sys\nsys.excepthook = lambda *given: os._exit(0)\nsys.unraisablehook = sys.excepthook",
    "an equal object": f"{EVIL}def add(a, b): return Evil()",
    "a class": f"{EVIL}class add(Evil):\n    def __init__(self, *given): pass",
    "a subclass of int": f"{EVIL}class Number(Evil, int): pass\ndef add(a, b): return Number(7)",
    "mock.ANY": "import unittest.mock\ndef add(a, b): return unittest.mock.ANY",
    "a magic mock": "from unittest.mock import MagicMock as add",
    "__reduce__": "class R:\n    def __reduce__(self): return eval, ('3',)\ndef add(a, b): return R()",
    "a file in the folder": "for n in ('json', 'ast'): open(n + '.py', 'w').write('import os; os._exit(0)')",
    "a type of data": "import decimal\ndecimal.Decimal.__eq__ = lambda *g: True",
    "memory of the parent": "import os\nopen(f'/proc/{os.getppid()}/mem', 'r+b')",
}  # fmt: skip


@strict
@pytest.mark.parametrize("how", FORGED)
def test_no_program_writes_its_verdict(how: str) -> None:
    program = FORGED[how] if "def add" in FORGED[how] or "add" in FORGED[how].split() else f"{WRONG}{FORGED[how]}"
    scored = rate(program)
    assert (scored.reward, scored.status) == (0.0, "wrong"), scored


@strict
def test_with_input_and_output_nothing_but_what_is_printed_counts() -> None:
    cases = '[{"input": "1", "output": "2"}]'
    for program in (
        VERDICTS,
        f"{VERDICTS}os._exit(0)",
        "raise OSError('cannot isolate: x')",
        "print('cannot isolate')",
    ):
        scored = rate(program, cases)
        assert (scored.reward, scored.status) == (0.0, "wrong"), scored


@strict
@pytest.mark.parametrize(
    "tests",
    [
        "assert 3 == add(1, 2)",
        "assert not add(1, 2) != 3",
        "assert abs(add(1, 2) - 3) < 1e-6",
        "assert -1e-6 < 3 - add(1, 2) < 1e-6",
        "assert not (add(1, 2) - 3)",
        "assert 3 in add(1, 2)",
        "assert add(1, 2) in (3, 4)",
        "assert [add(1, 2)] == [3]",
        "assert {'a': add(1, 2)} == {'a': 3}",
        "assert {add(1, 2)} == {3}",
        "assert list(map(lambda p: add(*p), [(1, 2)])) == [3]",
        "assert add(1, 2) > 2 and add(1, 2) < 4",
        "from math import isclose\nassert isclose(add(1, 2), 3)",
        "import unittest\nunittest.TestCase().assertEqual(add(1, 2), 3)",
        "def check(candidate):\n    assert candidate(1, 2) == 3\ncheck(add)",
        "if add(1, 2) != 3: raise ValueError",
    ],
)
@pytest.mark.parametrize("kind", ["def add(a, b): return Evil()", "class add(Evil):\n    def __init__(self, *g): pass"])
def test_an_object_that_equals_everything_equals_no_data(tests: str, kind: str) -> None:
    scored = rate(f"{EVIL}{kind}", tests)
    assert (scored.reward, scored.status) == (0.0, "wrong"), scored


@strict
@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def set(x): return 1", "assert set(unique([1, 1])) == set([2])"),
        ("def abs(x): return 0", "assert abs(unique([1])[0] - 2) < 1e-6"),
        ("def sorted(x): return 1", "assert sorted(unique([2, 2])) == sorted([3])"),
        ("class np: allclose = lambda *g: True", "assert np.allclose(unique([1]), [2])"),
        ("class math: isclose = lambda *g: True", "assert math.isclose(unique([1])[0], 2)"),
        ("import unittest.mock as json", "assert json.loads(str(unique([1])[0])) == 2"),
    ],
)
def test_builtins_and_modules_are_those_of_the_tests(program: str, tests: str) -> None:
    scored = rate(f"{program}\ndef unique(x): return list(dict.fromkeys(x))", tests)
    assert (scored.reward, scored.status) == (0.0, "wrong"), scored


@strict
@pytest.mark.parametrize("name", ["eval", "exec", "compile", "getattr", "setattr", "type", "__import__"])
def test_no_builtin_runs_what_a_program_returns(name: str) -> None:
    program = f"import os\ndef f(x): return {EXITS!r}\ng = {name}"
    scored = rate(program, "assert f(1)\ntry: h = g(f(1))\nexcept Exception: pass\nassert f(2) == 2")
    assert (scored.reward, scored.status) == (0.0, "wrong"), scored
    assert "the tests ended" not in (scored.detail or ""), "it ran in the process of the program, if at all"


@strict
def test_a_program_reads_nothing_of_the_tests() -> None:
    """Neither what it is expected to return, nor through functions and objects that the tests pass on."""
    wanted = "EXPECTED = 41\nclass Node:\n    value = 1\ndef oracle():\n    return EXPECTED\n"
    for expression in ("EXPECTED", "oracle()", "given.__globals__", "Node.__dict__", "given.__code__", "type(node).x"):
        program = f"def f(given, node):\n    return {expression}\n"
        scored = rate(program, f"{wanted}assert f(lambda: 1, Node()) is not None")
        assert (scored.reward, scored.status) == (0.0, "wrong"), (expression, scored)


@strict
@pytest.mark.parametrize(
    "program",
    [
        "def f(node, kind): node.right = lambda *given: True",
        "def f(node, kind): kind.right = lambda *given: True",
        "def f(node, kind): kind.__eq__ = lambda *given: True",
        "def f(node, kind): node.__class__ = object",
        "def f(node, kind): node.__dict__.clear()",
    ],
)
def test_a_program_changes_no_method_of_the_tests(program: str) -> None:
    tests = "class Node:\n    def right(self): return False\nn = Node()\nf(n, Node)\nassert n.right() or n == 3"
    scored = rate(program, tests)
    assert (scored.reward, scored.status) == (0.0, "wrong"), scored
    assert "PermissionError" in (scored.detail or "")


@strict
@pytest.mark.parametrize(
    "kind", ["StopIteration", "StopAsyncIteration", "GeneratorExit", "SystemExit", "KeyboardInterrupt"]
)
def test_no_exception_ends_the_tests_well(kind: str) -> None:
    for tests in (
        "assert all(map(lambda v: f(v) == 3, [1]))",
        "for v in map(f, [1]): assert v == 3",
        "list(map(f, [1]))",
    ):
        scored = rate(f"def f(v): raise {kind}", tests)
        assert (scored.reward, scored.status) == (0.0, "wrong"), scored
