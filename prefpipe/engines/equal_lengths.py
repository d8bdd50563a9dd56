"""Completions of prompts of one length in one batch, by the cache of transformers: for models with recurrent states,
position biases or masks of their own, whose rows must begin together. A prompt is computed once for all its draws."""

from collections.abc import Iterable, Iterator
from inspect import signature
from itertools import groupby
from typing import cast

import torch
from transformers import DynamicCache, PreTrainedModel

from prefpipe.engines.base import EngineSettings, Request
from prefpipe.engines.drawing import Completion, extend
from prefpipe.forward.logps import causal_model, plain_attention


def sample(
    policy: torch.nn.Module, requests: Iterable[Request], settings: EngineSettings
) -> Iterator[tuple[Request, list[Completion]]]:
    """Each request with its completions, batch by batch."""
    for batch in batches(requests, settings.max_num_seqs):
        by_request = [[Completion(request, draw) for draw in request.draws] for request in batch]
        _decode(policy, batch, [c for of_request in by_request for c in of_request], settings)
        yield from zip(batch, by_request, strict=True)


@torch.no_grad()
def _decode(
    policy: torch.nn.Module, requests: list[Request], completions: list[Completion], settings: EngineSettings
) -> None:
    """Sample all completions to their end; those that have ended leave the batch and its cache."""
    causal = causal_model(policy)
    causal.set_attn_implementation(plain_attention(causal))
    name = _cache_name(causal)
    cache = DynamicCache(config=causal.config) if name else None

    def logits(rows: list[list[int]]) -> torch.Tensor:
        options = {name: cache, "use_cache": True} if name else {"use_cache": False}
        ids = torch.tensor(rows, device=causal.device)
        return policy(input_ids=ids, logits_to_keep=1, **options).logits[:, -1].float()

    def choose(rows: list[int]) -> torch.Tensor:
        numbers = torch.tensor(rows, device=causal.device)
        if cache is not None:
            cache.reorder_cache(cast(torch.LongTensor, numbers))
        return numbers

    prompts = logits([request.prompt_token_ids for request in requests])
    behind = prompts[choose([number for number, request in enumerate(requests) for _ in request.draws])]
    while True:
        extend(completions, behind, settings)
        going = [number for number, completion in enumerate(completions) if not completion.finish_reason]
        if not going:
            return
        if len(going) < len(completions):
            completions = [completions[number] for number in going]
            choose(going)
        behind = logits([c.token_ids[-1:] if name else c.request.prompt_token_ids + c.token_ids for c in completions])


def _cache_name(causal: PreTrainedModel) -> str:
    """The argument by which a model takes a cache; none where it has no cache or one of its kind (RWKV, xLSTM): such a
    model computes whole rows again for every token."""
    taken = signature(causal.forward).parameters
    names = ("past_key_values",) if causal.config.model_type == "xlstm" else ("past_key_values", "cache_params")
    return next((name for name in names if name in taken), "")


def batches(requests: Iterable[Request], max_completions: int) -> Iterator[list[Request]]:
    """Neighbouring requests, re-ordered by prompt length inside a window, cut into batches of one length."""
    waiting: list[Request] = []
    for request in requests:
        waiting.append(request)
        if sum(len(r.draws) for r in waiting) >= 4 * max_completions:
            yield from _by_length(waiting, max_completions)
            waiting = []
    yield from _by_length(waiting, max_completions)


def _by_length(requests: list[Request], max_completions: int) -> Iterator[list[Request]]:
    ordered = sorted(requests, key=lambda r: len(r.prompt_token_ids))
    for _, same in groupby(ordered, key=lambda r: len(r.prompt_token_ids)):
        batch: list[Request] = []
        for request in same:
            if batch and sum(len(r.draws) for r in [*batch, request]) > max_completions:
                yield batch
                batch = []
            batch.append(request)
        yield batch
