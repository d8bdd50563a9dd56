"""Engines by name. A module is imported when its engine starts: each brings heavy packages."""

import importlib

from prefpipe.engines.base import Engine, EngineSettings

ENGINES = {
    "vllm": "prefpipe.engines.vllm:VllmEngine",
    "transformers": "prefpipe.engines.transformers:TransformersEngine",
    "server": "prefpipe.engines.server:ServerEngine",
    "fake": "prefpipe.engines.fake:FakeEngine",
}


def load(name: str, settings: EngineSettings) -> Engine:
    """Start an engine."""
    module, _, engine = ENGINES[name].partition(":")
    return getattr(importlib.import_module(module), engine)(settings)
