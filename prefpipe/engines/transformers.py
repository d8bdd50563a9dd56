"""The engine that works wherever transformers does: batched sampling, and scoring by the forward pass of training."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import chain, groupby
from typing import Self

import torch

from prefpipe import log, machine
from prefpipe.engines import equal_lengths
from prefpipe.engines.base import Draw, EngineSettings, Query, Request, Response, Sample, ScoreRequest
from prefpipe.engines.continuous import Batch
from prefpipe.engines.drawing import Completion
from prefpipe.errors import UsageError
from prefpipe.forward import load
from prefpipe.forward.layout import Tree, tree_with_masks
from prefpipe.forward.logps import ROWS_IN_WORDS, TreeModel, extremes, score, settle_rows
from prefpipe.models.policy import Policy

_PROMPTS_PER_CHUNK = 64
_TESTED_TOKENS = 16  # at the end of a long sequence: a window shows in each of them
_Sampled = tuple[Request, list[Completion]]


class TransformersEngine:
    """Prompts of all lengths run in one batch that stays full, without padding; every draw has its random source.

    A model whose completions cannot share a row runs prompts of one length at a time.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._hold(load.load_model(settings.policy.directory, settings.dtype), settings.policy)
        if not torch.cuda.is_available():
            machine.keep_freed_memory()

    def _hold(self, model: torch.nn.Module, policy: Policy) -> None:
        """Compute with a model and the adapter of a policy from now on."""
        self._model = TreeModel(load.with_adapter(model, policy.adapter))
        self._tested = 0  # tokens of the longest sequence for which the rows are known to be right

    @property
    def scorer(self) -> str:
        """The name of the numerics of the log-probs, which are those of the trainer's forward pass."""
        return load.scorer_name(self._settings.dtype)

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Sample]]]:
        """Yield each request with its samples; up to max_num_seqs draws are sampled at a time.

        Log-probs come from one scoring pass over the samples: by the trainer's forward, not by the decoding kernels.
        """
        for sampled in _filled(self._sampled(requests), self._settings.max_tokens_per_batch):
            trees = [Tree(r.prompt_token_ids, [c.token_ids for c in completions]) for r, completions in sampled]
            for (request, completions), logps in zip(sampled, self._score(trees), strict=True):
                yield (
                    request,
                    [
                        Sample(c.draw.sample_index, c.token_ids, values, c.finish_reason)
                        for c, values in zip(completions, logps, strict=True)
                    ],
                )

    def score(self, sequences: Iterable[ScoreRequest], *, adapter: bool) -> Iterator[tuple[str, list[float]]]:
        """The trainer's forward without gradient; neighbours with the same prompt share its computation."""
        with load.adapter_off(self._model.policy, off=not adapter):
            for prompts in _chunks(groupby(sequences, key=lambda s: tuple(s.prompt_token_ids))):
                trees = [
                    tree_with_masks(prompt, [(s.token_ids, s.loss_mask) for s in same]) for prompt, same in prompts
                ]
                for (_, same), values in zip(prompts, self._score(trees), strict=True):
                    yield from zip((s.completion_id for s in same), values, strict=True)

    def respond(self, queries: Iterable[Query]) -> Iterator[tuple[Query, Response]]:
        """Free text only; nothing is scored."""
        waiting: dict[str, Query] = {}
        for request, completions in self._sampled(map(_request, _kept(queries, waiting))):
            for completion in completions:
                yield waiting.pop(request.prompt_id), Response(completion.token_ids, completion.finish_reason)

    def _sampled(self, requests: Iterable[Request]) -> Iterator[_Sampled]:
        """Each request with its completions, in the order in which they end."""
        source = iter(requests)
        batch = Batch(self._model.policy, self._settings, self._shares_rows)
        yield from batch.sample(source)
        yield from equal_lengths.sample(self._model.policy, chain(batch.left, source), self._settings)

    def _shares_rows(self, request: Request) -> bool:
        """Whether sequences as long as those of a request can lie in one row, by the architecture and by a test on one:
        attention windows that a model keeps to itself show in sequences that are longer than they are."""
        prompt = request.prompt_token_ids
        length = len(prompt) + self._settings.max_tokens
        if self._model.rows == "shared" and length > self._tested:
            longest = (prompt * (length // len(prompt) + 1))[:length]
            end = longest[-min(_TESTED_TOKENS, length - 1) :]
            self._settle([Tree(longest[: -len(end)], [end, end[:1]])])
        return self._model.rows == "shared"

    def listen(self, heard: Callable[[int], object], max_tokens: int) -> None:
        """From now on `heard` takes every token as it is sampled, and completions have at most so many. What it raises
        ends the work; the engine goes on with the next one."""
        self._settings = replace(self._settings, heard=heard, max_tokens=max_tokens)

    def base(self) -> AbstractContextManager[None]:
        """The model with the adapter off, for the length of a `with` block."""
        return load.adapter_off(self._model.policy, off=True)

    def take(self, policy: Policy) -> bool:
        """The weights of the model stay; the modules of the adapter are taken out, and those of the other put in."""
        self._hold(self._model.policy, policy)
        return True

    def _score(self, trees: list[Tree]) -> list[list[list[float]]]:
        if self._model.rows != "single" and max(tree.longest_sequence for tree in trees) > self._tested:
            self._settle(extremes(trees))
        self._model.set_rows(self._model.rows)
        return list(score(self._model, trees, self._settings.max_tokens_per_batch))

    def _settle(self, trees: list[Tree]) -> None:
        """Choose the rows of this model anew, by a test on trees with longer sequences than before."""
        reason = settle_rows(self._model, trees, self._settings.dtype)
        if reason is not None:
            log.warn(f"every completion is scored {ROWS_IN_WORDS[self._model.rows]}: {reason}")
        self._tested = max(tree.longest_sequence for tree in trees)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        del self._model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the next engine in this process needs the memory


def _kept(queries: Iterable[Query], waiting: dict[str, Query]) -> Iterator[Query]:
    """The queries, each kept in `waiting` under its id until its answer takes it out."""
    for query in queries:
        if query.schema is not None:
            raise UsageError(
                "the transformers engine has no structured output", "use the vllm engine, or ask without a schema"
            )
        waiting[query.query_id] = query
        yield query


def _request(query: Query) -> Request:
    return Request(query.query_id, query.prompt_token_ids, (Draw(0, query.seed, query.temperature),))


def _filled(sampled: Iterable[_Sampled], max_tokens: int) -> Iterator[list[_Sampled]]:
    """Requests that have ended, as many as fill a scoring pass."""
    waiting: list[_Sampled] = []
    tokens = 0
    for request, completions in sampled:
        waiting.append((request, completions))
        tokens += len(request.prompt_token_ids) + sum(len(c.token_ids) for c in completions)
        if tokens >= max_tokens:
            yield waiting
            waiting, tokens = [], 0
    if waiting:
        yield waiting


_Prompt = tuple[tuple[int, ...], list[ScoreRequest]]


def _chunks(prompts: Iterable[tuple[tuple[int, ...], Iterator[ScoreRequest]]]) -> Iterator[list[_Prompt]]:
    """Prompts with their completions, some at a time: enough to fill a scoring pass, few enough to hold in memory."""
    waiting: list[_Prompt] = []
    for prompt, same in prompts:
        waiting.append((prompt, list(same)))
        if len(waiting) == _PROMPTS_PER_CHUNK:
            yield waiting
            waiting = []
    if waiting:
        yield waiting
