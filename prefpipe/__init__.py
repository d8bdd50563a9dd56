"""prefpipe: offline preference optimization with a reference cache you can trust.

    import prefpipe

    sampled = prefpipe.generate(prompts="prompts.jsonl", rewards=["short_sentence"], out="runs/g")
    pairs = prefpipe.build_pairs(completions=sampled, reward="short_sentence", out="runs/p")
    trained = prefpipe.train(pairs=pairs, out="runs/t")
    trained.metrics

Every name of `__all__` is imported when it is first used (docs/python.md).
"""

import importlib
from typing import Any

__version__ = "0.1.0"
_COMMANDS = (
    *("build_pairs", "evaluate", "gather", "generate", "iterate", "merge", "plan", "report", "score", "sweep", "train"),
)
__all__ = [*_COMMANDS, "PrefpipeError", "Run", "load"]  # type: ignore[reportUnsupportedDunderAll]  # the stub has them


def __getattr__(name: str) -> Any:
    if name not in __all__:  # `from prefpipe import log` asks here first
        raise AttributeError(f"module 'prefpipe' has no attribute '{name}'")
    return getattr(importlib.import_module("prefpipe.api.commands"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
