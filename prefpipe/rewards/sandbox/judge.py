"""The process of the tests: starts that of the program, runs the tests on what the program defines, gives the verdict.

The program's process is a fork that has seen neither the tests nor the descriptor of the verdict. A name in the tests
that they do not define is a builtin, a module of the standard library, or else the program's.
"""

import ast
import builtins
import importlib
import json
import os
import signal
import sys
from collections import Counter
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

from .limits import death_with_parent, isolate, limit
from .peer import Gone, Peer, read_exactly, write_all

_MODULE = "program"
_ALIASES = {"np": "numpy"}
# Modules without a function that runs text as code: what a program imports from them, the tests import themselves.
_HARMLESS = frozenset(
    [
        "bisect",
        "cmath",
        "collections",
        "copy",
        "datetime",
        "decimal",
        "fractions",
        "functools",
        "heapq",
        "itertools",
        "json",
        "math",
        "numbers",
        "operator",
        "random",
        "re",
        "statistics",
        "string",
    ]
)
_MODULES = sys.stdlib_module_names | {"numpy"}
_SHOWN = 400


def main(job_descriptor: int, verdict_descriptor: int) -> None:
    """Read the job, run the program and its tests, write the program's process id and the verdict, a line each."""
    death_with_parent(os.getppid())
    job = json.loads(_read_part(job_descriptor))
    descriptors = job_descriptor, verdict_descriptor
    job_folder = job["folder"] if job["isolation"] == "strict" else None
    try:
        limit(job["cpu_seconds"], job["memory_bytes"])
        child, peer = _start(job["program"], job_folder, descriptors, script=not job["tests"])
        write_all(verdict_descriptor, b"%d" % child)
        tests = json.loads(_read_part(job_descriptor)) if job["tests"] else None
        if job_folder is not None:
            isolate(job_folder, parent=True)
        peer.ask("isolate")
    except (OSError, ValueError, OverflowError) as error:
        verdict = "crash", f"cannot isolate: {error}"
    else:
        verdict = _judge(peer, child, tests)
    line = "\n" + json.dumps([verdict[0], verdict[1] and verdict[1][:_SHOWN]])
    write_all(verdict_descriptor, line.encode())
    os._exit(0)


def _read_part(descriptor: int) -> bytes:
    return read_exactly(descriptor, int.from_bytes(read_exactly(descriptor, 8), "big"))


def _start(program: str, folder: str | None, ours: tuple[int, ...], *, script: bool) -> tuple[int, Peer]:
    """The process id of a fork that serves a program, and this process's end of the calls to it."""
    asked, asking = os.pipe()
    answered, answering = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child:
        os.close(asked)
        os.close(answering)
        return child, Peer(answered, asking, guarded=True, module=_MODULE)
    for descriptor in (asking, answered, *ours):
        os.close(descriptor)
    death_with_parent(parent)
    serve(Peer(asked, answering, guarded=False), program, folder, script=script)
    sys.exit()  # as a script ends: threads are awaited, exit handlers run, output is flushed


def serve(peer: Peer, program: str, folder: str | None, *, script: bool) -> None:
    """The process of the program: answer the calls of the tests until they end."""
    namespace: dict[str, Any] = {"__name__": "__main__" if script else _MODULE}
    peer.accept = namespace.update
    peer.commands = {
        "isolate": lambda: folder and isolate(folder),
        "run": lambda: run(program, "program", namespace, script=script),
        "global": lambda name: _origin(namespace[name]),
        "undefined": lambda: sorted(_names(program) - namespace.keys() - vars(builtins).keys()),
    }
    peer.serve()


def run(text: str, name: str, namespace: dict[str, Any], *, script: bool) -> str | None:
    """Run Python in a namespace. Returns None, or the exception or exit code that ended it."""
    try:
        code: CodeType = compile(text, name, "exec")
        exec(code, namespace)  # noqa: S102  (this is the sandbox)
        sys.stdout.flush()
    except SystemExit as ended:
        if not script or ended.code not in (None, 0):
            return f"{name}: ended with exit code {ended.code}"
    except Gone:
        raise
    except BaseException as error:
        return f"{name}: {type(error).__name__}: {error}"
    return None


class Names(dict[str, Any]):
    """The namespace of the tests."""

    def __init__(self, peer: Peer, tests: str) -> None:
        super().__init__(__name__=_MODULE)
        self._peer = peer
        tree = ast.parse(tests, "tests")
        used, bound = _used(tree), _bound(tree)
        # `sum` is the program's when it is what the tests are about, else a program could pass with an `abs` that is 0
        self._shadows = not (used - bound - vars(builtins).keys())
        self._modules = _only_as_modules(tree)

    def __missing__(self, name: str) -> Any:
        if name in self._modules:
            return importlib.import_module(_ALIASES.get(name, name))
        if hasattr(builtins, name) and not self._shadows:
            raise KeyError(name)
        kind, origin, value = self._peer.ask("global", name)
        if kind == "module" and origin == _ALIASES.get(name, name) and origin in _MODULES:
            return importlib.import_module(origin)
        if kind == "member" and origin[0] in _HARMLESS:
            member = getattr(importlib.import_module(origin[0]), origin[1])
            if isinstance(member, (type, FunctionType, BuiltinFunctionType)):
                return member
        return value

    def classes(self, wanted: list[str]) -> dict[str, Any]:
        """The classes of the tests that the program names without defining them."""
        return {k: self[k] for k in wanted if k in self and isinstance(self[k], type)}


def _judge(peer: Peer, child: int, tests: str | None) -> tuple[str, str | None]:
    try:
        failure = peer.ask("run")
        if failure is None and tests is not None:
            failure = run_tests(peer, tests)
        if tests is not None:
            return ("ok", None) if failure is None else ("wrong", str(failure))
        peer.close()  # so that it ends
    except Gone:
        failure = "gone"
        peer.close()
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}"
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGXCPU:
        return "timeout", "CPU time"
    if failure == "gone":
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return "wrong", f"ended with {how} before it was over"
    return ("ok", None) if failure is None else ("wrong", str(failure))


def run_tests(peer: Peer, tests: str) -> str | None:
    """Run tests on what the program at the other end defines. Returns None, or the exception that ended them."""
    try:
        names = Names(peer, tests)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        return f"tests: {type(error).__name__}: {error}"
    wanted = peer.ask("undefined")
    peer.offer = lambda: names.classes(wanted)
    return run(tests, "tests", names, script=False)


def _origin(value: Any) -> tuple[str, Any, Any]:
    """What a global of the program is: a module, a member of one, or something else; its name there; and itself."""
    if isinstance(value, ModuleType):
        return "module", value.__name__, value
    module, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if isinstance(module, str) and isinstance(name, str):
        for place in (module, module.lstrip("_")):  # heapq.heappush says that it is of _heapq
            if place in sys.modules and getattr(sys.modules[place], name, None) is value:
                return "member", (place, name), value
    return "value", None, value


def _names(program: str) -> set[str]:
    try:
        return _used(ast.parse(program))
    except Exception:
        return set()


def _used(tree: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def _bound(tree: ast.AST) -> set[str]:
    bound: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.ExceptHandler(name=str(name)):
                bound.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                bound.add(name)
            case ast.alias(name=name, asname=alias):
                bound.add(alias or name.partition(".")[0])
            case _:
                pass
    return bound


def _only_as_modules(tree: ast.AST) -> set[str]:
    """Names of modules that stand nowhere but before a dot and the name of a member."""
    before_dots: Counter[str] = Counter()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=member) if _is_member(_ALIASES.get(name, name), member):
                before_dots[name] += 1
            case _:
                pass
    uses = Counter(n.id for n in ast.walk(tree) if isinstance(n, ast.Name))
    return {name for name, count in before_dots.items() if uses[name] == count}


def _is_member(module: str, name: str) -> bool:
    try:
        return module in _MODULES and hasattr(importlib.import_module(module), name)
    except ImportError:
        return False
