"""Functions of users, for rewards, losses and pair rules: by the name `module:function`, or passed as callables.

What identifies a function in the fingerprint of a run is the bytes of its module. A function of a notebook or a script
has no module that another process could import. It is known in this process under `__main__:function`, and identified
by its source and that of what it names: functions and classes beside it, and constants.
"""

import dis
import importlib
import inspect
import json
import os
import posix
import sys
import textwrap
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, NoReturn

from prefpipe import reading
from prefpipe.errors import Interrupted, MissingInputError, UsageError
from prefpipe.ids import content_id
from prefpipe.processes import current_folder

STOPS = (Interrupted, KeyboardInterrupt)  # no failures of the user's code
_MAIN = "__main__"
_IN_A_FILE = "write it into a file of its own, mine.py, import it from there, or name it as mine:function"
_here: dict[str, tuple[Callable[..., Any], str]] = {}  # `__main__:function` -> the function and its digest
_digests: dict[str, str] = {}  # of modules, as they were when they were imported here


def find(name: str, what: str = "reward", *, elsewhere: bool = False) -> Callable[..., Any]:
    """The function `module:function`; its module is imported anew where its file has changed. `what` it is for stands
    in errors, `elsewhere` says that other processes will look for it. Raises MissingInputError or UsageError when there
    is none."""
    module, _, attribute = name.partition(":")
    if module == _MAIN:
        _refuse_unless(
            name in _here and not elsewhere, f"{what} {name}", "it is a function of a notebook or script, which no "
            "other process can import"
        )  # fmt: skip
        return _here[name][0]
    try:
        with current_folder(), never_ends():
            return getattr(_imported(module), attribute)
    except ModuleNotFoundError as error:
        raise MissingInputError(
            f"{what} {name}: no module '{error.name}'", "run from the folder that holds it"
        ) from error
    except AttributeError as error:
        raise UsageError(f"{what} {name}: {module} has no '{attribute}'", "check the name of the function") from error
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"{what} {name} cannot be imported: {error}", "write it as module:function") from error
    except STOPS:
        raise
    except BaseException as error:  # of the user's module, which may even call sys.exit
        raise UsageError(
            f"{what} {name} cannot be imported: {type(error).__name__}: {error}", f"mend the module {module}"
        ) from error


def digest(name: str, what: str = "reward") -> str:
    """What identifies `module:function`: the digest of its module, for a module without a file the name; for a function
    of a notebook or script the digest of its source. Raises as `find` does."""
    find(name, what)
    if name in _here:
        return _here[name][1]
    source = sys.modules[name.partition(":")[0]].__file__
    return reading.file_digest(Path(source)) if source else name


def name_of(function: Callable[..., Any], what: str, *, elsewhere: bool = False) -> str:
    """The name of a callable, by which `find` finds it again. `elsewhere` says that other processes will look for it.

    Raises UsageError for one that no name leads to, or whose results no digest vouches for: a lambda, a function inside
    a function, an object, one without a source.
    """
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    shown = f"{what} {qualname or type(function).__name__}"
    _refuse_unless(bool(module and qualname), shown, "it is an object without a name, so that no run can find it again")
    _refuse_unless("<lambda>" not in str(qualname), shown, "a lambda has no name, so that no run can find it again")
    _refuse_unless("." not in str(qualname), shown, "it stands inside a function or class, where no run can find it")
    name = f"{module}:{qualname}"
    if module == _MAIN:
        _here[name] = (function, _source_digest(function, shown))
    _refuse_unless(
        find(name, what, elsewhere=elsewhere) is function,
        shown,
        f"{name} is another object: the module changed, or wraps the function",
    )
    return name


@contextmanager
def never_ends() -> Generator[None]:
    """While a user's code runs, what would end the command or put another program in its place raises SystemExit: else
    it could end with exit code 0 and no manifest. A child that the code forks ends by it as ever. Compiled code that
    calls the C library itself is beyond this."""
    process = os.getpid()
    before = [(module, name, getattr(module, name)) for module in (os, posix) for name in ("_exit", "execv", "execve")]
    for module, name, end in before:
        setattr(module, name, partial(_refuse_to_end, process, name, end))
    try:
        yield
    finally:
        for module, name, end in before:
            setattr(module, name, end)


def _refuse_to_end(process: int, name: str, end: Callable[..., NoReturn], *arguments: Any) -> NoReturn:
    if os.getpid() != process:
        end(*arguments)
    raise SystemExit(f"os.{name}({str(arguments[0])[:100] if arguments else ''})")


def _refuse_unless(condition: bool, shown: str, why: str) -> None:  # noqa: FBT001  (what must hold comes first)
    if not condition:
        raise UsageError(f"{shown} cannot be used: {why}", _IN_A_FILE)


def _imported(name: str) -> ModuleType:
    """A module as its file is now: a notebook imports one, its user edits it, and the digest is that of the edit."""
    module = importlib.import_module(name)
    source = getattr(module, "__file__", None)
    if source and Path(source).is_file():
        now = reading.file_digest(Path(source))
        if _digests.setdefault(name, now) != now:
            module = importlib.reload(module)
            _digests[name] = now
    return module


def _source_digest(function: Callable[..., Any], shown: str) -> str:
    """The digest of the source of a function, and of what it names beside it. Raises UsageError as `name_of` does."""
    _refuse_unless(isinstance(function, FunctionType), shown, "it is no function of Python, so that it has no source")
    found: dict[str, Any] = {}
    waiting: list[Any] = [function]
    while waiting:
        one = waiting.pop()
        name = one.__qualname__
        if name in found:
            continue
        try:
            found[name] = textwrap.dedent(inspect.getsource(one))
        except (OSError, TypeError) as error:
            raise UsageError(f"{shown} cannot be used: {name} has no source to identify it by", _IN_A_FILE) from error
        for part in _parts(one):
            _refuse_unless(part.__closure__ is None, shown, f"{name} keeps values of another function")
            _refuse_unless(
                _is_plain([part.__defaults__, part.__kwdefaults__]), shown, f"{name} has a default of any type"
            )
            found[f"{part.__qualname__}()"] = [part.__defaults__, part.__kwdefaults__]
            for word in sorted(_globals_in(part.__code__)):
                _add(word, part.__globals__, found, waiting, f"{shown} cannot be used: {name}")
    return content_id(found)


def _parts(one: Any) -> Iterator[FunctionType]:
    """The functions that a function or class consists of."""
    for value in (one,) if isinstance(one, FunctionType) else vars(one).values():
        if isinstance(value, FunctionType):
            yield value


def _globals_in(code: CodeType) -> set[str]:
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(_globals_in(part) for part in code.co_consts if isinstance(part, CodeType)))


def _add(word: str, names: dict[str, Any], found: dict[str, Any], waiting: list[Any], who: str) -> None:
    """Note what a global name stands for: code beside the function is read in its turn, code elsewhere goes by name."""
    if word not in names:  # a builtin, or one that is defined later: its call fails
        return
    value = names[word]
    if isinstance(value, ModuleType):
        found[word] = value.__name__
    elif isinstance(value, FunctionType | type) and value.__module__ == _MAIN:
        waiting.append(value)
    elif callable(value) and getattr(value, "__module__", None) and getattr(value, "__qualname__", None):
        found[word] = f"{value.__module__}:{value.__qualname__}"
    elif _is_plain(value):
        found[word] = value
    else:
        raise UsageError(f"{who} reads {word}, a {type(value).__name__} that no digest can identify", _IN_A_FILE)


def _is_plain(value: object) -> bool:
    try:
        json.dumps(value, sort_keys=True)
    except (TypeError, ValueError):
        return False
    return True
