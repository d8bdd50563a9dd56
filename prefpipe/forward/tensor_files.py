"""safetensors files by byte ranges: rows of a tensor are read, and written, where they stand in the file.

A row is a slice along the first dimension; a tensor without dimensions is one row. Nothing but the rows that are asked
for is held in memory.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefpipe.errors import DataError
from prefpipe.reading import opened
from prefpipe.runs import in_place

_NAMES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_OF_DTYPE = {dtype: name for name, dtype in _NAMES.items()}
_PIECE = 16 << 20  # bytes that are cast or moved to the device at once
_MOST_HEADER = 100_000_000  # bytes, as in safetensors
_ALIGNED = 8  # bytes: where the first tensor of a file begins

Shapes = Mapping[str, tuple[torch.dtype, Sequence[int]]]  # dtype and shape of tensors by name


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file, which begins at byte `start` of it."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    def read(self, first: int, into: torch.Tensor) -> None:
        """Read the rows from `first` on into a contiguous tensor, as many as it has; it may have another dtype or
        device. Raises DataError where the file ends before them."""
        with opened(self.path) as file, torch.no_grad():
            file.seek(self._place(first))
            for piece in _pieces(into.detach(), self.dtype):
                direct = piece.dtype == self.dtype and piece.device.type == "cpu"
                held = piece if direct else torch.empty(piece.shape, dtype=self.dtype)
                left = memoryview(held.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
                while left:
                    count = file.readinto(left)  # type: ignore[attr-defined]  # FileIO
                    if not count:
                        raise DataError(f"{self.path} ends in the middle of a tensor", "fetch or save it again")
                    left = left[count:]
                if not direct:
                    piece.copy_(held)

    def write(self, first: int, rows: torch.Tensor) -> None:
        """Write rows from `first` on, in the dtype of the file."""
        in_place.write_at(
            self.path,
            self._place(first),
            (
                memoryview(piece.to("cpu", self.dtype).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
                for piece in _pieces(rows.detach().contiguous(), self.dtype)
            ),
        )

    def whole(self) -> torch.Tensor:
        """The tensor, on the CPU."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.read(0, tensor)
        return tensor

    def _place(self, first: int) -> int:
        return self.start + first * math.prod(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """A safetensors file that is to be written: its name, its first bytes, its size, and its tensors as they will be
    stored in a folder."""

    name: str
    head: bytes
    size: int
    places: Mapping[str, tuple[torch.dtype, tuple[int, ...], int]]

    def stored(self, folder: Path) -> dict[str, Stored]:
        """The tensors of the file, where it stands in `folder`."""
        return {name: Stored(folder / self.name, *place) for name, place in self.places.items()}


def plan(tensors: Shapes, stem: str, largest: int) -> list[Plan]:
    """Files of at most `largest` bytes of tensors (a larger tensor stands alone) under the names of transformers:
    `stem.safetensors`, or `stem-00001-of-00002.safetensors` and so on. The same on every rank."""
    parts: list[list[str]] = [[]]
    held = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        if parts[-1] and held + size > largest:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += size
    number = len(parts)
    names = [f"{stem}-{i:05d}-of-{number:05d}" for i in range(1, number + 1)] if number > 1 else [stem]
    return [
        _planned(f"{name}.safetensors", {n: tensors[n] for n in part}) for name, part in zip(names, parts, strict=True)
    ]


def index(files: Sequence[Plan]) -> dict[str, Any]:
    """What `model.safetensors.index.json` says of a model in several files."""
    shapes = {name: (dtype, shape) for file in files for name, (dtype, shape, _) in file.places.items()}
    total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in shapes.values())
    return {
        "metadata": {"total_size": total},
        "weight_map": {name: file.name for file in files for name in sorted(file.places)},
    }


def write_index(files: Sequence[Plan], folder: Path) -> None:
    """Write the index of a model in several files; one in a single file has none."""
    if len(files) > 1:
        text = json.dumps(index(files), indent=2)
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def copy(source: Stored, target: Stored) -> None:
    """Copy a tensor from file to file, into the dtype of the second. A few of its rows are in memory at any time."""
    row = max(1, math.prod(source.shape[1:]) * max(source.dtype.itemsize, target.dtype.itemsize))
    count = max(1, _PIECE // row)
    for first in range(0, source.shape[0] if source.shape else 1, count):
        shape = (min(count, source.shape[0] - first), *source.shape[1:]) if source.shape else ()
        rows = torch.empty(shape, dtype=target.dtype)
        source.read(first, rows)
        target.write(first, rows)


def _planned(file: str, tensors: Shapes) -> Plan:
    """Tensors of wide numbers come first, so that each begins at a multiple of its item size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _OF_DTYPE[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    head = len(text).to_bytes(8, "little") + text
    places = {
        name: (tensors[name][0], tuple(tensors[name][1]), len(head) + header[name]["data_offsets"][0])
        for name in tensors
    }
    return Plan(file, head, len(head) + end, places)


def stored(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name. Raises DataError for a header that is none, or that does not fit the
    file."""
    with opened(path) as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(_MOST_HEADER, size - 8):
            raise _damaged(path)
        text = file.read(length)
    try:
        header = json.loads(text)
        found = {
            name: Stored(path, _NAMES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
            if name != "__metadata__"
        }
        fits = all(t.start >= 8 + length and t.start + _size(t) <= size for t in found.values())
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise _damaged(path) from error
    if not fits:
        raise _damaged(path)
    return found


def same_content(one: Stored, other: Stored) -> bool:
    """Whether two stored tensors have equal values. A row of each is in memory at any time."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    rows = torch.empty((2, *one.shape[1:]), dtype=one.dtype)
    for number in range(one.shape[0] if one.shape else 1):
        for tensor, row in zip((one, other), rows, strict=True):
            tensor.read(number, row)
        if not torch.equal(rows[0], rows[1]):
            return False
    return True


def _size(tensor: Stored) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _pieces(tensor: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    flat = tensor.view(-1)
    return iter(flat.split(_PIECE // dtype.itemsize)) if flat.numel() else iter(())


def _damaged(path: Path) -> DataError:
    return DataError(f"{path} is damaged: its header does not describe its tensors", "fetch or save it again")
