"""The recipes of this package: what their headers say, and copies of them with the files that they name."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prefpipe import reading
from prefpipe.config import base
from prefpipe.config.iterate import IterateConfig
from prefpipe.errors import UsageError
from prefpipe.runs import fsio
from prefpipe.shipped import ROOT

_KEY = re.compile(r"# ([A-Z][a-z]+) {2,}(\S.*)")
_MORE = re.compile(r"# {3,}(\S.*)")
_COMMANDS = ("needs", "run")  # lines of a header that may hold commands, one each
_FILE = re.compile(r"(?:data|stages)/[\w./-]+")  # a file of this package as a recipe names it, relative to ROOT


@dataclass(frozen=True)
class Recipe:
    """A recipe by its name, COMMAND/NAME. The other fields are lines of its header, empty where it has none."""

    name: str
    purpose: str
    hardware: str
    expected: str
    needs: str
    run: str

    @property
    def path(self) -> Path:
        """Where it stands, relative to ROOT and to a folder that it is copied to."""
        return Path("stages") / f"{self.name}.toml"

    @property
    def command(self) -> str:
        """The first command of its header, without the remark behind it."""
        return self.run.splitlines()[0].partition("   ")[0]


def listed() -> list[Recipe]:
    """Every recipe, by name."""
    return [_read(path) for path in sorted((ROOT / "stages").glob("*/*.toml"))]


def find(name: str) -> Recipe:
    """The recipe of a name: COMMAND/NAME, or NAME where one command alone has it. Raises UsageError for another one."""
    recipes = {recipe.name: recipe for recipe in listed()}
    asked = name.removeprefix("stages/").removesuffix(".toml")
    matching = [known for known in recipes if asked in (known, known.partition("/")[2])]
    if len(matching) == 1:
        return recipes[matching[0]]
    if matching:
        raise UsageError(f"recipe '{name}' is one of several", f"name one of {', '.join(matching)}")
    short = {known.partition("/")[2]: known for known in recipes}
    raise UsageError(f"no recipe '{name}'{base.suggestion(asked, [*recipes, *short])}", "`prefpipe recipes` lists them")


def demo(settings: Mapping[str, Any]) -> IterateConfig:
    """The settings of the demo, with these flags, on the prompts of this installation wherever it is started."""
    prompts = str(ROOT / "data" / "prompts.jsonl")
    shipped = {"generate.prompts": prompts, "evaluate.prompts": prompts}
    return base.load(IterateConfig, ROOT / find("iterate/demo").path, {**shipped, **settings})


def copy(recipe: Recipe, to: Path) -> list[Path]:
    """Copy a recipe into the folder `to`, with its schema and the files of this package that it names, each at the
    place that it has here: the commands in its header then work in `to`.

    Returns the paths of the copies. Raises UsageError, before anything is written, where another file stands at such a
    place.
    """
    copies = {to / path: ROOT / path for path in _files(recipe)}
    for target, source in copies.items():
        if target.exists() and (not target.is_file() or target.read_bytes() != source.read_bytes()):
            raise UsageError(f"{target} is there already and is another file", "move it away, or choose another --to")
    for target, source in copies.items():
        fsio.write_atomic(target, partial(shutil.copyfile, source))
    return [*copies]


def _files(recipe: Recipe) -> list[Path]:
    """A recipe, its schema, and the files that it names, relative to ROOT."""
    settings = [line for line in reading.read_text(ROOT / recipe.path).splitlines() if not line.startswith("#")]
    named = {Path(path) for path in _FILE.findall("\n".join(settings))}
    return [recipe.path, recipe.path.with_name("schema.json"), *sorted(p for p in named if (ROOT / p).is_file())]


def _read(path: Path) -> Recipe:
    header: dict[str, str] = {}
    key = ""
    for line in reading.read_text(path).splitlines():
        if first := _KEY.fullmatch(line):
            key = first[1].lower()
            header[key] = first[2]
        elif key and (more := _MORE.fullmatch(line)):
            header[key] += ("\n" if key in _COMMANDS else " ") + more[1]
        else:
            key = ""
    fields = {name: header.get(name, "") for name in ("purpose", "hardware", "expected", "needs", "run")}
    return Recipe(f"{path.parent.name}/{path.stem}", **fields)
