"""`python -m tests.meta.stub` writes prefpipe/__init__.pyi: what type checkers and editors know of `import prefpipe`.

A command has one TypedDict of its settings, which is its keyword arguments and, for a step of iterate, its table.
"""

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from prefpipe.api import calls, commands
from prefpipe.config.base import PATH
from prefpipe.config.plan import PlanConfig

PATH_OF_STUB = Path(__file__).parents[2] / "prefpipe" / "__init__.pyi"
HEAD = '''"""Written by `make fix` from the settings of the commands: do not edit."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from prefpipe.api.run import Run as Run
from prefpipe.errors import PrefpipeError as PrefpipeError

__version__: str
Place = str | os.PathLike[str]
Function = str | Callable[..., Any]
'''
# Settings that take functions beside names.
FUNCTIONS = ("rewards", "reward", "loss_type", "rule")


def stub() -> str:
    """The text of the file."""
    classes: dict[str, type[BaseModel]] = {}
    for cls, _ in calls.STAGES.values():
        classes |= dict(_classes(cls))
    classes |= dict(_classes(PlanConfig))
    tables = [_table(name, cls) for name, cls in classes.items()]
    made = [_made(name, cls) for name, (cls, _) in calls.STAGES.items()]
    return "\n\n".join([HEAD + "\n", *tables, *made, *_written()]).replace("\n\n\n\n", "\n\n\n") + "\n"


def _classes(cls: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """A class of settings behind those of its tables and the class that it extends, by the names of their types."""
    for base in _extended(cls):
        yield from _classes(base)
    for field in cls.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _classes(field.annotation)
    yield _name(cls), cls


def _name(cls: type[BaseModel]) -> str:
    return f"{cls.__name__.removesuffix('Config').removesuffix('Settings')}Settings"


def _table(name: str, cls: type[BaseModel]) -> str:
    """The type of the settings of a class, beside those of the class that it extends."""
    known = {setting for base in _extended(cls) for setting in base.model_fields}
    types_ = {setting: _type(setting, field) for setting, field in cls.model_fields.items() if setting not in known}
    extended = ", ".join(map(_name, _extended(cls))) or "TypedDict"
    lines = [f"class {name}({extended}, total=False):", *(f"    {setting}: {kind}" for setting, kind in types_.items())]
    return "\n".join(lines) + "\n"


def _extended(cls: type[BaseModel]) -> list[type[BaseModel]]:
    """The classes of settings that a class extends."""
    return [base for base in cls.__bases__ if issubclass(base, BaseModel) and base.model_fields]


def _made(command: str, cls: type[BaseModel]) -> str:
    name = command.replace("-", "_")
    text = textwrap.fill(f'"""{cls.__doc__} `help(prefpipe.{name})` explains every setting."""', 116)
    return (
        f"def {name}(\n    recipe: Place | None = None, *, out: Place, force: bool = False, "
        f"**settings: Unpack[{_name(cls)}]\n) -> Run:\n{textwrap.indent(text, '    ')}\n"
    )


def _written() -> Iterator[str]:
    """The functions that stand in `commands`, as they stand there."""
    module = ast.parse(inspect.getsource(commands))
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            node.decorator_list, node.body = [], node.body[:1]
            if node.name == "plan":
                assert node.args.kwarg is not None
                node.args.kwarg.annotation = ast.parse("Unpack[PlanSettings]", mode="eval").body
            yield ast.unparse(node).replace('"Run"', "Run").replace("'Run'", "Run") + "\n"


def _type(name: str, field: FieldInfo) -> str:
    single: Any = field.annotation
    several = get_origin(single) is tuple
    if several:
        single = get_args(single)[0]
    if name in FUNCTIONS:
        text = "Function"
    elif PATH in field.metadata and single is str:
        text = "Place"
    else:
        text = _plain(single)
    return f"{text} | Sequence[{text}]" if several else text


def _plain(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        return _plain(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return f"Literal[{', '.join(map(repr, get_args(kind)))}]".replace("'", '"')
    if get_origin(kind) in (dict, Mapping):
        return "Mapping[str, Any] | str"
    if get_origin(kind) in (Union, types.UnionType):
        return " | ".join(map(_plain, get_args(kind)))
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return _name(kind)
    return "None" if kind is type(None) else kind.__name__


if __name__ == "__main__":
    PATH_OF_STUB.write_text(stub())
