"""What costs time and decides nothing in a test. There are thousands of runs in the suite."""

import gc
import os

from prefpipe.stages.train import memory

WHOLE_PROBE = {name: getattr(memory, name) for name in ("_PROBE_TOKENS", "_PASSES")}


def quick() -> None:
    """No waiting for the disk, since tests kill processes and no machine: what was written is with the kernel. A probe
    of the memory by one pass over few tokens: a tiny model fits whatever it finds. And what imports made stays frozen:
    vLLM thaws it whenever an engine ends, and looks for garbage in it nine times for every engine."""
    os.fsync = lambda _descriptor: None
    gc.unfreeze = lambda: None
    memory._PROBE_TOKENS, memory._PASSES = 32, 1
