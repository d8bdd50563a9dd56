"""What an engine is: it samples completions, scores given ones and answers queries.

Token ids in, token ids and raw log-probs out. What answers a query has no log-probs: see `Response`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from prefpipe.models.chat import Chat
from prefpipe.models.policy import Policy


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
class ScoreRequest:
    """A given completion to score."""

    completion_id: str
    prompt_token_ids: list[int]
    token_ids: list[int]


@dataclass(frozen=True)
class Query:
    """A prompt whose one answer is read and never trained on. `schema` is the JSON Schema that the answer must follow,
    with its keys in the order of `properties`; None leaves it free. temperature 0 is greedy."""

    query_id: str
    prompt_token_ids: list[int]
    seed: int
    temperature: float
    schema: dict[str, Any] | None


@dataclass(frozen=True)
class Response:
    """What answers a query. finish_reason: stop or length.

    It has no log-probs on purpose: under a schema they are renormalised over the tokens that the schema allows, and no
    reference may be made from them. A `Request`, whose samples have log-probs, can hold no schema.
    """

    token_ids: list[int]
    finish_reason: str


class Engine(Protocol):
    """Samples, scores and answers with one policy; leaving the `with` block frees it."""

    @property
    def scorer(self) -> str:
        """Names the numerics of the log-probs: engine, version, dtype."""
        ...

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Sample]]]:
        """Each request with its samples, in the order in which they finish; requests are taken as needed."""
        ...

    def score(self, sequences: Iterable[ScoreRequest], *, adapter: bool) -> Iterator[tuple[str, list[float]]]:
        """(completion_id, raw log-prob of every completion token), with the adapter on or off."""
        ...

    def respond(self, queries: Iterable[Query]) -> Iterator[tuple[Query, Response]]:
        """Each query with its answer, in the order in which they finish. Raises UsageError for a query with a schema
        where the engine has no structured output."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
