"""What an engine is: it samples completions and scores given ones. Token ids in, token ids and raw log-probs out."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from prefpipe.chat import Chat
from prefpipe.models import Policy


@dataclass(frozen=True)
class EngineSettings:
    """What an engine needs to start. max_model_len: longest prompt + completion, in tokens. max_tokens_per_batch bounds
    one scoring pass; stop_token_ids end a completion beside the model's own; top_k 0 and min_p 0 leave nothing out."""

    policy: Policy
    chat: Chat
    dtype: str
    top_p: float
    max_tokens: int
    max_model_len: int
    max_num_seqs: int
    kv_cache_mib: int
    top_k: int = 0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.85
    max_tokens_per_batch: int = 2048

    @property
    def stops(self) -> frozenset[int]:
        """Every id that ends a completion."""
        return self.chat.eos_token_ids | set(self.stop_token_ids)


@dataclass(frozen=True)
class Draw:
    """One completion to sample. temperature 0 is greedy."""

    sample_index: int
    seed: int
    temperature: float


@dataclass(frozen=True)
class Request:
    """A prompt and the completions to sample for it."""

    prompt_id: str
    prompt_token_ids: list[int]
    draws: tuple[Draw, ...]


@dataclass(frozen=True)
class Sample:
    """A sampled completion. token_ids hold the end-of-sequence id when it was sampled; token_logps (nats) are raw
    log-probs at temperature 1, one per token. finish_reason: stop or length."""

    sample_index: int
    token_ids: list[int]
    token_logps: list[float]
    finish_reason: str


@dataclass(frozen=True)
class Sequence:
    """A given completion to score."""

    completion_id: str
    prompt_token_ids: list[int]
    token_ids: list[int]


class Engine(Protocol):
    """Samples and scores with one policy; leaving the `with` block frees it."""

    @property
    def scorer(self) -> str:
        """Names the numerics of the log-probs: engine, version, dtype."""
        ...

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Sample]]]:
        """Each request with its samples, in the order in which they finish; requests are taken as needed."""
        ...

    def score(self, sequences: Iterable[Sequence], *, adapter: bool) -> Iterator[tuple[str, list[float]]]:
        """(completion_id, raw log-prob of every completion token), with the adapter on or off."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
