"""Rows of safetensors files where they stand: what safetensors reads and writes, in any dtype and number of files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefpipe.errors import DataError
from prefpipe.forward import tensor_files
from prefpipe.runs import in_place

TENSORS = {
    "a": torch.arange(12.0).reshape(4, 3),
    "b": torch.arange(5, dtype=torch.int64),
    "c": torch.linspace(-2, 2, 6).reshape(3, 2).to(torch.bfloat16),
    "d": torch.tensor(7.0, dtype=torch.float64),
    "e": torch.tensor([True, False, True]),
    "none": torch.zeros(0, 4, dtype=torch.float16),
}
SHAPES = {name: (tensor.dtype, tensor.shape) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize(("largest", "names"), [(1000, ["w.safetensors"]), (50, ["w-00001-of-00003.safetensors"])])
def test_rows_written_in_any_order_are_the_file(tmp_path: Path, largest: int, names: list[str]):
    files = tensor_files.plan(SHAPES, "w", largest)
    assert files[0].name == names[0]
    for file in files:
        in_place.create(tmp_path / file.name, file.head, file.size)
        for name, stored in reversed(list(file.stored(tmp_path).items())):
            rows = TENSORS[name]
            stored.write(1, rows[1:]) if rows.dim() else None
            stored.write(0, rows[:1] if rows.dim() else rows)
    read = {name: t for file in files for name, t in load_file(tmp_path / file.name).items()}
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in TENSORS.items())
    index = tensor_files.index(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())


def test_rows_of_a_file_that_safetensors_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In the dtype of the file, and cast, piece by piece."""
    monkeypatch.setattr(tensor_files, "_PIECE", 8)
    save_file(TENSORS, tmp_path / "w.safetensors", {"format": "pt"})
    stored = tensor_files.stored(tmp_path / "w.safetensors")
    assert {n: (s.dtype, s.shape) for n, s in stored.items()} == {n: (d, tuple(s)) for n, (d, s) in SHAPES.items()}
    assert all(torch.equal(stored[n].whole(), t) for n, t in TENSORS.items())
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.empty(2, 3, dtype=dtype)
        stored["a"].read(1, rows)
        assert torch.equal(rows, TENSORS["a"][1:3].to(dtype))
    assert tensor_files.same_content(stored["a"], stored["a"])
    assert not tensor_files.same_content(stored["a"], stored["b"])


def test_values_are_cast_to_the_dtype_of_the_file(tmp_path: Path):
    (file,) = tensor_files.plan({"a": (torch.bfloat16, (4, 3))}, "w", 1000)
    in_place.create(tmp_path / file.name, file.head, file.size)
    file.stored(tmp_path)["a"].write(0, TENSORS["a"] / 3)
    assert torch.equal(load_file(tmp_path / file.name)["a"], (TENSORS["a"] / 3).to(torch.bfloat16))


def header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = [
    b"", b"\0" * 7, b"\xff" * 8, header("[1]"), header("{"), header("[" * 100_000), header('{"w": 1}'),
    header(json.dumps({"w": ENTRY})),  # without the bytes of the tensor
    header(json.dumps({"w": ENTRY | {"dtype": "F7"}})) + b"\0" * 8,
    header(json.dumps({"w": ENTRY | {"data_offsets": [-8, 0]}})) + b"\0" * 8,
]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=r"w\.safetensors is damaged"):
        tensor_files.stored(tmp_path / "w.safetensors")


def test_a_file_that_was_cut_after_its_header_was_read(tmp_path: Path):
    save_file({"a": TENSORS["a"]}, tmp_path / "w.safetensors")
    stored = tensor_files.stored(tmp_path / "w.safetensors")["a"]
    (tmp_path / "w.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:-4])
    with pytest.raises(DataError, match="ends in the middle of a tensor"):
        stored.whole()
