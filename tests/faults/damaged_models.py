"""Ways to damage a folder of a model or an adapter."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Change = Callable[[Path], None]
VALUES: dict[str, Any] = {
    "null": None, "a number": -1, "a huge number": 10**400, "a fraction": 0.5, "a text": "x", "no text": "",
    "true": True, "a list": [], "a list of lists": [[]], "an object": {}, "half a character": "\ud800",
}  # fmt: skip


def _bytes(change: Callable[[bytes], bytes]) -> Change:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


def _flipped(content: bytes, share: float, bit: int) -> bytes:
    place = min(int(len(content) * share), len(content) - 1)
    return content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]


def _as_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _as_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


ANY_FILE: dict[str, Change] = {
    "empty": _bytes(lambda _: b""),
    "a third": _bytes(lambda b: b[: len(b) // 3]),
    "without its last byte": _bytes(lambda b: b[:-1]),
    "a bit at the start": _bytes(lambda b: _flipped(b, 0, 4)),
    "a bit in the middle": _bytes(lambda b: _flipped(b, 0.5, 1)),
    "a high bit": _bytes(lambda b: _flipped(b, 0.3, 128)),
    "zeros": _bytes(lambda b: bytes(len(b))),
    "null": _bytes(lambda _: b"null"),
    "a number": _bytes(lambda _: b"7"),
    "a list": _bytes(lambda _: b"[]"),
    "an object": _bytes(lambda _: b"{}"),
    "deep": _bytes(lambda _: b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "two bytes for a letter": _bytes(lambda b: b.decode("latin-1").encode("utf-16")),
    "a directory": _as_directory,
    "a link to itself": _as_loop,
    "gone": Path.unlink,
}


def _with(path: Path, keys: tuple[str, ...], value: Any) -> None:
    content = json.loads(path.read_text())
    *outer, last = keys
    inner = content
    for key in outer:
        inner = inner[key]
    inner[last] = value
    path.write_text(json.dumps(content))


def _keys(content: dict[str, Any], depth: int) -> Iterator[tuple[str, ...]]:
    for name, value in content.items():
        yield (name,)
        if isinstance(value, dict) and depth > 1 and len(value) < 50:
            yield from ((name, *rest) for rest in _keys(value, depth - 1))


def changes(folder: Path) -> Iterator[tuple[str, Change]]:
    """Every change to a folder, with its name: of whole files, and of every value of their JSON."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        for what, change in ANY_FILE.items():
            yield f"{name}: {what}", lambda top, name=name, change=change: change(top / name)
        if path.suffix == ".json":
            for keys in _keys(json.loads(path.read_text()), 3):
                for what, value in VALUES.items():
                    yield (
                        f"{name}: {'.'.join(keys)} is {what}",
                        lambda top, name=name, keys=keys, value=value: _with(top / name, keys, value),
                    )


def damaged(folder: Path, into: Path, change: Change) -> Path:
    """A copy of a folder with a change."""
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(folder, into)
    change(into)
    return into
