"""The functions of `import prefpipe`. A command with settings has one by itself, from its class; the others stand here.

Settings have their Python names, as in a recipe; `recipe` is a TOML file or the config.json of a run, and what is given
by keyword goes before it. Errors are PrefpipeError, with the hint in their text.
"""

import importlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from prefpipe.api import calls, keywords
from prefpipe.config import base
from prefpipe.config.commands import SETTINGS
from prefpipe.errors import PrefpipeError as PrefpipeError

if TYPE_CHECKING:
    from prefpipe.api.run import Run

Place = str | os.PathLike[str]

_PROCESSES = ("iterate",)  # commands whose steps are processes, which import the functions of users by name
_RUN = """

    recipe: a TOML file, or the config.json of a run; settings that are given by keyword go before it.
    out: the directory of the run. The same call with the same `out` resumes the run, or finds it complete.
    force: start over; what is in `out` moves to its quarantine/ folder.

Returns the Run. Raises PrefpipeError of some kind, with a hint in its text: UsageError for a setting that is unknown or
wrong, and for an `out` of other settings; DataError, MissingInputError, StorageError, LockedError, IdentityError.

Settings:
"""


def load(directory: Place) -> "Run":
    """The run in a directory, complete or not. Raises MissingInputError where there is no such directory, DataError
    where it holds no run of prefpipe."""
    with calls.in_words():
        return importlib.import_module("prefpipe.api.run").Run(directory)


def gather(*runs: Place, out: Place, force: bool = False) -> "Run":
    """Join the runs of all parts (`part="I/N"`) of generate, score or evaluate into the run that one command makes.

    Returns the run in `out`. Raises UsageError for runs that are not all parts of one command, MissingInputError for
    one that is not complete, DataError for a damaged one.
    """
    with calls.in_words():
        calls.gather([_path(run) for run in runs], _path(out), force=force)
    return load(out)


def report(run: Place, out: Place | None = None) -> Path:
    """Write one HTML page about a run, or about all rounds of iterate, finished or not, to `out`, by default
    report.html in it. Returns its path. Raises MissingInputError and DataError as `load` does."""
    with calls.in_words():
        return calls.report(_path(run), None if out is None else _path(out))


def merge(run: Place, out: Place, model: str = "") -> Path:
    """Merge the adapter of a run of train, or of the best round of iterate, into the weights of its base.

    `model` is the base, if it is not where it was. Returns `out`, which holds the merged model. Raises UsageError for a
    run without an adapter and for an `out` that holds something else, IdentityError for another base, DataError for a
    damaged adapter.
    """
    with calls.in_words():
        calls.merge(_path(run), _path(out), model)
    return _path(out)


def plan(recipe: Place | None = None, **settings: Any) -> str:
    """What a run of train with these settings will cost, as text: memory by part (GiB), tokens, steps, time (minutes),
    by a probe of one step; or, with `gpus`, the memory of a rank for so many of them (each of `gpu_memory` GiB), from
    config.json. It writes nothing. All other settings and errors are those of train."""
    with calls.in_words():
        return "\n".join(calls.plan(_config("plan", recipe, settings)))


def _config(command: str, recipe: Place | None, given: dict[str, Any]) -> BaseModel:
    settings = keywords.flags(SETTINGS[command], given, elsewhere=command in _PROCESSES)
    name = command.replace("-", "_")
    return calls.settings(command, None if recipe is None else _path(recipe), settings, f"prefpipe.{name}()")


def _path(place: Place) -> Path:
    return base.local_path(os.fspath(place))


def _function(command: str, cls: type[BaseModel]) -> Callable[..., "Run"]:
    """The function of a command with settings; editors and `help` see its keyword arguments."""

    def call(recipe: Place | None = None, *, out: Place, force: bool = False, **settings: Any) -> "Run":
        with calls.in_words():
            calls.run(command, _config(command, recipe, settings), _path(out), force=force)
        return load(out)

    name = command.replace("-", "_")
    given = inspect.signature(call).parameters
    kind = inspect.Parameter.KEYWORD_ONLY
    defaults = {setting: field.get_default(call_default_factory=True) for setting, field in cls.model_fields.items()}
    keys = [inspect.Parameter(setting, kind, default=value) for setting, value in defaults.items()]
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # what inspect reads
        [*(given[word] for word in ("recipe", "out", "force")), *keys]
    )
    call.__name__ = call.__qualname__ = name
    call.__module__ = "prefpipe"
    meanings = [f"    {n}: {' '.join((f.description or '').split())}\n" for n, f in cls.model_fields.items()]
    call.__doc__ = f"{cls.__doc__}{_RUN}{''.join(meanings)}"
    return call


def __getattr__(name: str) -> Any:
    if name == "Run":
        return importlib.import_module("prefpipe.api.run").Run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


globals().update({name.replace("-", "_"): _function(name, cls) for name, (cls, _) in calls.STAGES.items()})
