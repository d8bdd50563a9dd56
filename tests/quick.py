"""What costs time and decides nothing in a test. There are thousands of runs in the suite."""

import gc
import os
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig, PreTrainedConfig

from prefpipe.inference import pool_size
from prefpipe.stages.train import memory

_SHORT = ((memory, "_PROBE_TOKENS", 32), (memory, "_PASSES", 1), (pool_size, "_FEWEST_SHARDS", 10**9))
_USUAL = [(module, name, getattr(module, name)) for module, name, _ in _SHORT]


def quick() -> None:
    """No waiting for the disk, since tests kill processes and no machine: what was written is with the kernel. A probe
    of the memory by one pass over few tokens: a tiny model fits whatever it finds. No workers on CPUs that no setting
    asks for: each starts an interpreter. What imports made stays frozen: vLLM thaws it whenever an engine ends, and
    looks for garbage in it nine times for every engine. No stack is written down for each seed of a GPU that is not
    initialised, three times for every step of a training. And no config of transformers is spelled out for a line of
    its log that nobody reads, three times for every model that is loaded."""
    os.fsync = lambda _descriptor: None
    gc.unfreeze = lambda: None
    for module in (torch.cuda, torch.xpu, torch.mtia):
        module.traceback = SimpleNamespace(format_stack=list)
    GenerationConfig.__repr__ = PreTrainedConfig.__repr__ = object.__repr__
    for module, name, value in _SHORT:
        setattr(module, name, value)


def usual(patch: pytest.MonkeyPatch) -> None:
    """The probe and the number of workers that users have."""
    for module, name, value in _USUAL:
        patch.setattr(module, name, value)
