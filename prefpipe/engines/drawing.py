"""One more token for every completion that is being sampled: the likeliest one, or a draw from its random source.

A draw is exact and takes few random numbers: first a block of 256 tokens by the mass of the blocks, then a token of the
block, both by the Gumbel-max trick. Kernels that round differently change a draw only where two candidates nearly tie;
with a cumulative sum over the vocabulary every rounding would move all borders behind it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad

from prefpipe.engines.base import Draw, EngineSettings, Request

_BLOCK = 256
_NUCLEUS = 1024  # tokens that hold top_p, mostly


@dataclass
class Completion:
    """A completion while it is being sampled; `finish_reason` is empty until its end."""

    request: Request
    draw: Draw
    token_ids: list[int] = field(default_factory=list[int])
    finish_reason: str = ""

    def __post_init__(self) -> None:
        self.source = torch.Generator().manual_seed(self.draw.seed)


def extend(completions: Sequence[Completion], logits: torch.Tensor, settings: EngineSettings) -> None:
    """Give every completion one more token, from float32 logits [B, V]; those that end get their reason."""
    stops = settings.stops
    temperatures = [c.draw.temperature for c in completions]
    tokens = draw(logits, temperatures, [c.source for c in completions], settings)
    for completion, token in zip(completions, tokens, strict=True):
        completion.token_ids.append(token)
        full = len(completion.token_ids) == settings.max_tokens
        completion.finish_reason = "stop" if token in stops else "length" if full else ""
        if settings.heard is not None:
            settings.heard(token)


def draw(
    logits: torch.Tensor,
    temperatures: Sequence[float],
    sources: Sequence[torch.Generator],
    settings: EngineSettings,
) -> list[int]:
    """Token ids [B] from float32 logits [B, V], which are overwritten: the largest where the temperature is 0, else a
    draw from the tokens that min_p, top_k and top_p leave, applied in vLLM's order."""
    if not any(temperatures):
        return logits.argmax(-1).tolist()
    best = logits.argmax(-1) if 0 in temperatures else None
    heat = torch.tensor([t or 1.0 for t in temperatures], device=logits.device).unsqueeze(1)
    scaled = _kept(logits.div_(heat), settings)
    missing = -scaled.shape[1] % _BLOCK
    blocks = (pad(scaled, (0, missing), value=-torch.inf) if missing else scaled).unflatten(1, (-1, _BLOCK))
    noise = _gumbels(sources, temperatures, blocks.shape[1] + _BLOCK, logits.device)
    mass = (blocks - scaled.amax(-1)[:, None, None]).exp_().sum(-1).double()
    rows = torch.arange(len(blocks), device=logits.device)
    block = (mass.log() + noise[:, :-_BLOCK]).argmax(-1)
    token = (blocks[rows, block].double() + noise[:, -_BLOCK:]).argmax(-1)
    drawn = block * _BLOCK + token
    if best is None:
        return drawn.tolist()
    greedy = torch.tensor([t == 0 for t in temperatures], device=logits.device)
    return torch.where(greedy, best, drawn).tolist()


def _gumbels(
    sources: Sequence[torch.Generator], temperatures: Sequence[float], count: int, device: torch.device
) -> torch.Tensor:
    """float64 Gumbel noise [B, count] on the CPU's generators, so that a seed gives the same on every device; zeros for
    greedy rows, which take none."""
    uniform = torch.full((len(sources), count), math.exp(-1.0), dtype=torch.float64)
    for row, source, temperature in zip(uniform, sources, temperatures, strict=True):
        if temperature:
            torch.rand(count, generator=source, dtype=torch.float64, out=row)
    return -(-uniform.log()).log().to(device)


def _kept(scaled: torch.Tensor, settings: EngineSettings) -> torch.Tensor:
    """The logits [B, V] with -inf for all tokens that min_p, top_k and top_p leave out."""
    if settings.min_p > 0:
        least = scaled.amax(-1, keepdim=True) + math.log(settings.min_p)
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if 0 < settings.top_k < scaled.shape[1]:
        least = scaled.topk(settings.top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if settings.top_p < 1:
        scaled = _nucleus(scaled, settings.top_p)
    return scaled


def _nucleus(scaled: torch.Tensor, top_p: float) -> torch.Tensor:
    """Only the likeliest tokens whose mass reaches top_p; the one that crosses it stays."""
    total = scaled.logsumexp(-1, keepdim=True)
    for count in (_NUCLEUS, scaled.shape[1]):
        ordered, order = scaled.topk(min(count, scaled.shape[1]))
        shares = (ordered - total).exp()
        reached = shares.cumsum(-1)
        if count >= scaled.shape[1] or bool((reached[:, -1] >= top_p).all()):
            break
    kept = ordered.masked_fill(reached - shares >= top_p, -torch.inf)
    return torch.full_like(scaled, -torch.inf).scatter(1, order, kept)
