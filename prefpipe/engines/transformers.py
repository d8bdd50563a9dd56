"""The engine that works wherever transformers does: batched sampling, and scoring by the trainer's own forward."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from types import TracebackType
from typing import Self

import torch
import transformers
from transformers import DynamicCache

from prefpipe.engines.base import Draw, EngineSettings, Request, Sample, Sequence
from prefpipe.forward import load
from prefpipe.forward.attention import NAME
from prefpipe.forward.layout import Tree
from prefpipe.forward.logps import causal_model, score


@dataclass
class _Row:
    """One completion while it is being sampled."""

    request: Request
    draw: Draw
    source: torch.Generator
    token_ids: list[int] = field(default_factory=list)
    token_logps: list[float] = field(default_factory=list)
    finish_reason: str = ""


class TransformersEngine:
    """Prompts of equal length run as one batch, so nothing is padded; every draw has a random source of its own."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._model: torch.nn.Module = load.load_model(settings.policy.directory, settings.dtype)
        if settings.policy.adapter is not None:
            self._model = load.load_adapter(self._model, settings.policy.adapter, trainable=False)
        self._eos = torch.tensor(sorted(settings.chat.eos_token_ids))

    @property
    def scorer(self) -> str:
        """Names the numerics of sampled log-probs: they come from decoding with a KV cache, not from `score`."""
        return f"transformers-{transformers.__version__}-decode/{self._settings.dtype}"

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Sample]]]:
        """Yield each request with its samples; batches hold up to max_num_seqs draws over prompts of one length."""
        load.switch_attention(self._model, "sdpa")
        try:
            for batch in _batches(requests, self._settings.max_num_seqs):
                rows = [_Row(r, d, torch.Generator().manual_seed(d.seed)) for r in batch for d in r.draws]
                self._decode(rows)
                for request, own in groupby(rows, key=lambda row: row.request):
                    yield (
                        request,
                        [Sample(r.draw.sample_index, r.token_ids, r.token_logps, r.finish_reason) for r in own],
                    )
        finally:
            load.switch_attention(self._model, NAME)

    def score(self, sequences: Iterable[Sequence], *, adapter: bool) -> Iterator[tuple[str, list[float]]]:
        """The trainer's own forward; neighbours with the same prompt share it."""
        load.switch_attention(self._model, NAME)
        with load.adapter_off(self._model, off=not adapter):
            for prompt, group in groupby(sequences, key=lambda s: tuple(s.prompt_token_ids)):
                own = list(group)
                (values,) = score(self._model, [Tree(prompt, [s.token_ids for s in own])])
                yield from zip((s.completion_id for s in own), values, strict=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._model

    @torch.no_grad()
    def _decode(self, rows: list[_Row]) -> None:
        """Sample all rows to their end; finished rows leave the batch and its cache."""
        device = causal_model(self._model).device
        cache = DynamicCache(config=causal_model(self._model).config)
        ids = torch.tensor([row.request.prompt_token_ids for row in rows], device=device)
        active = list(rows)
        while active:
            logits = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            logps = logits.float().log_softmax(-1).cpu()
            chosen = torch.stack([_draw(logps[i], row, self._settings.top_p) for i, row in enumerate(active)])
            for i, (row, token) in enumerate(zip(active, chosen.tolist(), strict=True)):
                row.token_ids.append(token)
                row.token_logps.append(float(logps[i, token]))
            stopped = torch.isin(chosen, self._eos).tolist()
            for row, stop in zip(active, stopped, strict=True):
                full = len(row.token_ids) == self._settings.max_tokens
                row.finish_reason = "stop" if stop else "length" if full else ""
            going = [i for i, row in enumerate(active) if not row.finish_reason]
            if len(going) < len(active):
                active = [active[i] for i in going]
                cache.batch_select_indices(torch.tensor(going, dtype=torch.long, device=device))
            ids = chosen[going].unsqueeze(1).to(device)


def _draw(logps: torch.Tensor, row: _Row, top_p: float) -> torch.Tensor:
    """One token from log-probs [V] by the Gumbel trick; greedy at temperature 0, else from the nucleus."""
    if row.draw.temperature == 0:
        return logps.argmax()
    scaled = (logps / row.draw.temperature).log_softmax(-1)
    if top_p < 1:
        ordered, order = scaled.sort(descending=True)
        outside = ordered.exp().cumsum(-1) - ordered.exp() >= top_p  # the token that crosses top_p stays
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
