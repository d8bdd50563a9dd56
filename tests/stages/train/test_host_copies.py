"""Copies of a checkpoint on the host: of a GPU, for which a class stands in here, in pinned memory that is kept."""

from dataclasses import dataclass, field

import pytest
import torch

from prefpipe import machine
from prefpipe.forward.shards import Copied
from prefpipe.stages.train import host_copies
from prefpipe.stages.train.host_copies import HostCopies, Pinning


@dataclass
class Gpu:
    """Says that every tensor but those of 16-bit integers is on it, hands out memory, and counts the waits."""

    handed_out: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    waits: int = 0

    def memory(self, like: torch.Tensor) -> torch.Tensor:
        self.handed_out.append(torch.empty(like.shape, dtype=like.dtype))
        return self.handed_out[-1]

    def wait(self) -> None:
        self.waits += 1

    def pinning(self) -> Pinning:
        return Pinning(lambda tensor: tensor.dtype != torch.int16, self.memory, self.wait)


def tensors() -> dict[str, torch.Tensor]:
    return {"w": torch.arange(6.0).reshape(2, 3).T, "step": torch.tensor(1), "rows": torch.ones(5, dtype=torch.int16)}


def values(copies: dict[str, Copied]) -> list[object]:
    return [copy.rows.tolist() for copy in copies.values()]


def test_memory_of_a_gpu_is_kept_and_all_copies_are_waited_for_once():
    gpu, held = Gpu(), tensors()
    copies = HostCopies(gpu.pinning())
    first = copies.take(held, leads=True)
    assert values(first) == [tensor.tolist() for tensor in held.values()]
    assert [copy.shape for copy in first.values()] == [tensor.shape for tensor in held.values()]
    assert (len(gpu.handed_out), gpu.waits) == (2, 1)
    before = values(first)
    for tensor in held.values():
        tensor.add_(1)
    assert values(first) == before
    second = copies.take(held, leads=True)
    assert values(second) == [tensor.tolist() for tensor in held.values()]
    assert (len(gpu.handed_out), gpu.waits) == (2, 2)
    assert first["rows"].rows.tolist() == before[2]  # on a CPU each checkpoint has its memory


def test_a_tensor_of_another_shape_or_dtype_gets_other_memory():
    gpu = Gpu()
    copies = HostCopies(gpu.pinning())
    for tensor in (torch.zeros(4), torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bfloat16)):
        copies.take({"w": tensor}, leads=True)
    assert [memory.shape for memory in gpu.handed_out] == [(4,), (2, 2), (2, 2)]


def test_what_is_kept_is_not_needed_again():
    """24 bytes of a pinned tensor take 32, 8 take 8, and 10 on a CPU 10. Other ranks copy none of what is not cut."""
    copies = HostCopies(Gpu().pinning())
    assert copies.nbytes(tensors(), leads=True) == 32 + 8 + 10
    assert copies.nbytes(tensors(), leads=False) == 0
    copies.take(tensors(), leads=True)
    assert copies.nbytes(tensors(), leads=True) == 10


def test_a_machine_without_a_gpu_never_waits_for_one():
    copies = HostCopies()
    assert copies.nbytes(tensors(), leads=True) == 24 + 8 + 10
    assert values(copies.take(tensors(), leads=True)) == [tensor.tolist() for tensor in tensors().values()]


@pytest.mark.parametrize(("nbytes", "pinned"), [(0, 0), (1, 1), (3, 4), (4, 4), (4097, 8192)])
def test_pinned_memory_comes_in_powers_of_two(nbytes: int, pinned: int):
    assert host_copies.pinned_bytes(nbytes) == pinned


@pytest.mark.parametrize(("beside_gpu", "room"), [(True, 500), (False, 62)])
def test_copies_take_a_share_of_what_training_leaves(monkeypatch: pytest.MonkeyPatch, beside_gpu: bool, room: int):
    monkeypatch.setattr(machine, "available_memory", lambda: 1100)
    assert host_copies.fit(room, beside_gpu=beside_gpu, taken=100)
    assert not host_copies.fit(room + 1, beside_gpu=beside_gpu, taken=100)
