"""Rows of this rank: without ranks they are all of them. `tests/stages/train/ranks.py` has the shards of two."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from prefpipe.forward import shards, tensor_files


def test_a_tensor_that_is_not_cut_is_filled_from_memory_and_from_a_file(tmp_path: Path):
    wanted = torch.arange(6.0).reshape(3, 2)
    save_file({"w": wanted, "n": torch.tensor(3.0)}, tmp_path / "w.safetensors")
    stored = tensor_files.stored(tmp_path / "w.safetensors")
    for source in (wanted, stored["w"]):
        target = torch.nn.Parameter(torch.zeros(3, 2))
        shards.fill(target, source)
        assert torch.equal(target, wanted)
        assert torch.equal(shards.whole(source), wanted)
    assert shards.own_rows(wanted) == (0, wanted)
    assert shards.local(wanted) is wanted
    number = torch.zeros(())
    shards.fill(number, stored["n"])
    assert number == 3
