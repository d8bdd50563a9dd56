"""What an engine is: it samples completions, scores completions of any origin and answers queries, with one policy.

    with engines.load("fake", settings) as engine:
        two = Request("p1", prompt_token_ids, (Draw(0, seed=7, temperature=1.0), Draw(1, seed=8, temperature=1.0)))
        for request, samples in engine.generate([two]):
            print(request.prompt_id, samples[0].token_ids, samples[0].token_logps)

Why the cut is here: token ids go in, token ids and raw log-probs come out. Chat templates, text, rewards and files stay
with the callers, so that every engine sees the same ids, log-probs of two engines can be compared token by token
(parity), and a new engine is one class. What answers a query has no log-probs: see `Response`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import compress
from typing import Any, Protocol, Self

from pydantic import BaseModel

from prefpipe.models.chat import Chat
from prefpipe.models.policy import Policy


@dataclass(frozen=True)
class EngineSettings:
    """What an engine needs to start."""

    policy: Policy
    chat: Chat
    dtype: str
    top_p: float
    # Tokens of a completion, and of the longest prompt with its completion.
    max_tokens: int
    max_model_len: int
    # Completions that are sampled at the same time.
    max_num_seqs: int
    # The cache of keys and values on CPU; on a GPU it gets a share of the memory.
    kv_cache_mib: int
    # 0 leaves nothing out.
    top_k: int = 0
    min_p: float = 0.0
    # Ids that end a completion, beside those of the model.
    stop_token_ids: tuple[int, ...] = ()
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.85
    # Tokens of one scoring pass.
    max_tokens_per_batch: int = 2048
    # The largest rank of adapters that the engine may have to take later; 0 where none but that of the policy comes.
    lora_rank: int = 0
    # The servers of an engine behind a URL, the environment variable with their key, and the limit of one request.
    base_urls: tuple[str, ...] = ()
    api_key_env: str = ""
    timeout_seconds: float = 600.0
    # Takes every token as it is sampled, where somebody reads along (the transformers engine).
    heard: Callable[[int], object] | None = None

    @classmethod
    def of(cls, config: BaseModel, policy: Policy, chat: Chat, **others: Any) -> Self:
        """The settings that a config has under the same names; `others` go before them."""
        named = {f.name: getattr(config, f.name) for f in fields(cls) if f.name in type(config).model_fields}
        settings: dict[str, Any] = {**named, "policy": policy, "chat": chat, **others}
        return cls(**settings)

    @property
    def stops(self) -> frozenset[int]:
        """Every token id that ends a completion."""
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
    """A completion to score, from any source. `loss_mask` says which of its tokens are scored; None: all of them."""

    completion_id: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    loss_mask: list[bool] | None = None

    def scored(self, values: list[float]) -> list[float]:
        """Of the values of all tokens those of the scored ones."""
        return values if self.loss_mask is None else list(compress(values, self.loss_mask))


@dataclass(frozen=True)
class Query:
    """A prompt with one answer, which is read and never trained on. `schema` is the JSON Schema that the answer must
    follow, with its keys in the order of `properties`; None leaves it free. temperature 0 is greedy."""

    query_id: str
    prompt_token_ids: list[int]
    seed: int
    temperature: float
    schema: dict[str, Any] | None


@dataclass(frozen=True)
class Response:
    """The answer to a query. finish_reason: stop or length.

    It has no log-probs on purpose: under a schema they are renormalised over the tokens that the schema allows, and
    must not become reference log-probs. A `Request`, whose samples have log-probs, can hold no schema.
    """

    token_ids: list[int]
    finish_reason: str


class Engine(Protocol):
    """Samples, scores and answers with one policy; leaving the `with` block frees it."""

    @property
    def scorer(self) -> str:
        """The name of the numerics of the log-probs: engine, version, dtype."""
        ...

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Sample]]]:
        """Each request with its samples, in the order in which requests finish; they are taken as the engine needs
        them."""
        ...

    def score(self, sequences: Iterable[ScoreRequest], *, adapter: bool) -> Iterator[tuple[str, list[float]]]:
        """(completion_id, raw log-prob of every scored token in nats), with the adapter on or off."""
        ...

    def respond(self, queries: Iterable[Query]) -> Iterator[tuple[Query, Response]]:
        """Each query with its answer, in the order in which answers finish. Raises UsageError for a query with a schema
        when the engine has no structured output."""
        ...

    def take(self, policy: Policy) -> bool:
        """Go on with another policy of the same model, which differs in its adapter; what comes out is what a new
        engine gives. False where this engine cannot, and is as it was. Nothing may be in work."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...
