"""The engine that works wherever transformers does: batched sampling, and scoring by the forward pass of training."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from types import TracebackType
from typing import Self

import torch
from transformers import DynamicCache

from prefpipe import log
from prefpipe.engines.base import Draw, EngineSettings, Query, Request, Response, Sample, ScoreRequest
from prefpipe.errors import UsageError
from prefpipe.forward import load
from prefpipe.forward.layout import Tree, tree_with_masks
from prefpipe.forward.logps import (
    ROWS_IN_WORDS,
    TreeModel,
    causal_model,
    extremes,
    plain_attention,
    score,
    settle_rows,
)
from prefpipe.models.policy import Policy

_PROMPTS_PER_CHUNK = 64


@dataclass
class _Row:
    """One completion while it is being sampled."""

    request: Request
    draw: Draw
    source: torch.Generator
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""


class TransformersEngine:
    """Prompts of equal length run as one batch, so that nothing is padded; every draw has its random source."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._eos = torch.tensor(sorted(settings.stops))
        self._hold(load.load_model(settings.policy.directory, settings.dtype), settings.policy)

    def _hold(self, model: torch.nn.Module, policy: Policy) -> None:
        """Compute with a model and the adapter of a policy from now on."""
        self._model = TreeModel(load.with_adapter(model, policy.adapter))
        self._tested = 0  # tokens of the longest sequence for which the rows are known to be right

    @property
    def scorer(self) -> str:
        """The name of the numerics of the log-probs, which are those of the trainer's forward pass."""
        return load.scorer_name(self._settings.dtype)

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Sample]]]:
        """Yield each request with its samples; batches hold up to max_num_seqs draws over prompts of one length.

        Log-probs come from one scoring pass over the samples: by the trainer's forward, not by the decoding kernels.
        """
        for batch in _batches(requests, self._settings.max_num_seqs):
            rows = [_Row(r, d, torch.Generator().manual_seed(d.seed)) for r in batch for d in r.draws]
            self._decode(rows)
            by_request = [[row for row in rows if row.request is request] for request in batch]
            trees = [
                Tree(request.prompt_token_ids, [row.token_ids for row in drawn])
                for request, drawn in zip(batch, by_request, strict=True)
            ]
            for request, drawn, logps in zip(batch, by_request, self._score(trees), strict=True):
                yield (
                    request,
                    [
                        Sample(row.draw.sample_index, row.token_ids, values, row.finish_reason)
                        for row, values in zip(drawn, logps, strict=True)
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
        """Free text only, in batches over prompts of one length; nothing is scored."""
        waiting: dict[str, Query] = {}
        for batch in _batches(map(_request, _kept(queries, waiting)), self._settings.max_num_seqs):
            rows = [_Row(r, d, torch.Generator().manual_seed(d.seed)) for r in batch for d in r.draws]
            self._decode(rows)
            for row in rows:
                yield waiting.pop(row.request.prompt_id), Response(row.token_ids, row.finish_reason)

    def take(self, policy: Policy) -> bool:
        """The weights of the model stay; the modules of the adapter are taken out, and those of the other put in."""
        self._hold(self._model.policy, policy)
        return True

    def _score(self, trees: list[Tree]) -> list[list[list[float]]]:
        longest = max(tree.longest_sequence for tree in trees)
        if self._model.rows != "single" and longest > self._tested:  # a window shows in sequences that are longer
            reason = settle_rows(self._model, extremes(trees), self._settings.dtype)
            if reason is not None:
                log.warn(f"every completion is scored {ROWS_IN_WORDS[self._model.rows]}: {reason}")
            self._tested = longest
        self._model.set_rows(self._model.rows)
        return list(score(self._model, trees, self._settings.max_tokens_per_batch))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the next engine in this process needs the memory

    @torch.no_grad()
    def _decode(self, rows: list[_Row]) -> None:
        """Sample all rows to their end; finished rows leave the batch and its cache."""
        causal = causal_model(self._model.policy)
        causal.set_attn_implementation(plain_attention(causal))
        device = causal.device
        cache = DynamicCache(config=causal.config)
        ids = torch.tensor([row.request.prompt_token_ids for row in rows], device=device)
        active = list(rows)
        while active:
            logits = self._model.policy(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[
                :, -1
            ]
            logps = logits.float().log_softmax(-1).cpu()
            chosen = torch.stack([_draw(logps[i], row, self._settings) for i, row in enumerate(active)])
            for row, token in zip(active, chosen.tolist(), strict=True):
                row.token_ids.append(token)
            stopped = torch.isin(chosen, self._eos).tolist()
            for row, stop in zip(active, stopped, strict=True):
                full = len(row.token_ids) == self._settings.max_tokens
                row.finish_reason = "stop" if stop else "length" if full else ""
            going = [i for i, row in enumerate(active) if not row.finish_reason]
            if len(going) < len(active):
                active = [active[i] for i in going]
                cache.batch_select_indices(torch.tensor(going, dtype=torch.long, device=device))
            ids = chosen[going].unsqueeze(1).to(device)


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


def _draw(logps: torch.Tensor, row: _Row, settings: EngineSettings) -> torch.Tensor:
    """One token id, a scalar, from log-probs [V]: the largest at temperature 0, else a draw (Gumbel-max trick) from the
    tokens that min_p, top_k and top_p leave, applied in vLLM's order."""
    if row.draw.temperature == 0:
        return logps.argmax()
    scaled = (logps / row.draw.temperature).log_softmax(-1)
    if settings.min_p > 0:
        scaled[scaled < scaled.max() + math.log(settings.min_p)] = -torch.inf
    if 0 < settings.top_k < len(scaled):
        scaled[scaled < scaled.topk(settings.top_k).values[-1]] = -torch.inf
    if settings.top_p < 1:
        ordered, order = scaled.log_softmax(-1).sort(descending=True)
        outside = ordered.exp().cumsum(-1) - ordered.exp() >= settings.top_p  # the token that crosses top_p stays
        scaled[order[outside]] = -torch.inf
    uniform = torch.rand(scaled.shape, generator=row.source, dtype=torch.float64)
    return (scaled - (-uniform.log()).log()).argmax()


def _batches(requests: Iterable[Request], max_rows: int) -> Iterator[list[Request]]:
    """Neighbouring requests, re-ordered by prompt length inside a window, cut into batches of one length."""
    waiting: list[Request] = []
    for request in requests:
        waiting.append(request)
        if sum(len(r.draws) for r in waiting) >= 4 * max_rows:
            yield from _by_length(waiting, max_rows)
            waiting = []
    yield from _by_length(waiting, max_rows)


def _by_length(requests: list[Request], max_rows: int) -> Iterator[list[Request]]:
    ordered = sorted(requests, key=lambda r: len(r.prompt_token_ids))
    for _, same in groupby(ordered, key=lambda r: len(r.prompt_token_ids)):
        batch: list[Request] = []
        for request in same:
            if batch and sum(len(r.draws) for r in [*batch, request]) > max_rows:
                yield batch
                batch = []
            batch.append(request)
        yield batch


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
