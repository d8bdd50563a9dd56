"""Log-probs of target tokens from hidden states, chunk by chunk: never a [N, V] tensor.

x = h @ W.T, plus a bias b [V] where the head has one (Phi 2, GPT-J), are the raw scores; a rule makes logits of them.
N = target tokens, H = hidden size, V = vocabulary. For any loss, d log p(y) / d h = sum_v (1[v = y] - p_v) dl_v / dh.
With a frozen head the forward pass stores that vector (for plain logits u = W[y] - sum_v p_v W_v), so that backward is
one multiplication and no matrix product is computed twice. A trainable head recomputes its chunks in backward and
gathers its gradient in float32. Sums over the vocabulary are float32 whatever the dtype.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

CHUNK = 256  # rows of one product with the head: [CHUNK, V] is the largest tensor here
_CACHED_ROWS = 8  # rows whose logits stay in the cache of a CPU


@dataclass(frozen=True)
class LogitRule:
    """From raw scores x to logits: multiply x by scale, then, with a cap, take cap * tanh(x / cap)."""

    scale: float = 1.0
    cap: float | None = None


def logit_rule(text: object) -> LogitRule:
    """The rule of a model, by the names that (text) configs have for it: Cohere, Falcon-H1 and Muse Glimmer multiply,
    Granite divides, HyperCLOVA X multiplies under the name of Granite; Gemma, RecurrentGemma and xLSTM cap."""
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        scale *= getattr(text, name, None) or 1.0
    scaling = getattr(text, "logits_scaling", None) or 1.0
    scale *= scaling if getattr(text, "model_type", None) == "hyperclovax" else 1 / scaling
    caps = (
        getattr(text, name, None) for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    )
    return LogitRule(scale, next((cap for cap in caps if cap), None))


def target_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    rule: LogitRule = LogitRule(),
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """hidden [N, H], weight [V, H], targets [N], bias [V] -> float32 log-probs [N] in nats."""
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    head = _TrainableHead if trained and torch.is_grad_enabled() else _FrozenHead
    return head.apply(hidden, weight, bias, targets, rule)


@torch.no_grad()
def log_collisions(
    hidden: torch.Tensor, weight: torch.Tensor, rule: LogitRule = LogitRule(), bias: torch.Tensor | None = None
) -> torch.Tensor:
    """hidden [N, H], weight [V, H], bias [V] -> float32 log sum_v p_v^2 [N]: the log-probability that two draws are the
    same."""
    pieces: list[torch.Tensor] = []
    step = min(CHUNK, _rows_at_once(weight.device))
    for start in range(0, hidden.shape[0], CHUNK):
        raw = _raw(hidden[start : start + CHUNK], weight, bias)
        for part in raw.split(step):
            logits = _ruled(part.float(), rule)
            pieces.append((2 * logits).logsumexp(dim=1) - 2 * logits.logsumexp(dim=1))
    return torch.cat(pieces)


@torch.no_grad()
def logits(
    hidden: torch.Tensor, weight: torch.Tensor, rule: LogitRule = LogitRule(), bias: torch.Tensor | None = None
) -> torch.Tensor:
    """hidden [N, H], weight [V, H], bias [V] -> float32 logits [N, V] of a few rows.

    The large matrix stands on the left: on CPU the product of few rows is then up to 1.5 times as fast.
    """
    columns = hidden.T
    raw = weight @ columns if bias is None else torch.addmm(bias.unsqueeze(1), weight, columns)
    return _ruled(raw.T.contiguous().float(), rule)


def chunk_bytes(weight: torch.Tensor) -> int:
    """The most bytes that this module takes at once: raw scores of a chunk, and float32 copies of the rows at once."""
    return weight.shape[0] * (CHUNK * weight.element_size() + 3 * 4 * _rows_at_once(weight.device))


def _raw(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Raw scores [R, V]; the bias is added before they are rounded, as in a linear module."""
    return hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)


def _rows_at_once(device: torch.device) -> int:
    """Rows whose logits are computed together. On CPU a few, which stay in the cache through all passes over them:
    twice as fast for 16-bit weights. On a GPU a whole chunk: many small kernels would wait for their launches."""
    return _CACHED_ROWS if device.type == "cpu" else CHUNK


def _to_logps(raw: torch.Tensor, targets: torch.Tensor, rule: LogitRule, *, slopes: bool) -> torch.Tensor:
    """float32 log-probs [R] of targets [R] from raw scores x [R, V]; `slopes` overwrites x with
    (1[v = y] - p_v) dl_v / dx_v, rounded to its dtype."""
    step = _rows_at_once(raw.device)
    return torch.cat(
        [
            _block(raw[i : i + step], targets[i : i + step].unsqueeze(1), rule, slopes=slopes)
            for i in range(0, raw.shape[0], step)
        ]
    )


def _ruled(scores: torch.Tensor, rule: LogitRule) -> torch.Tensor:
    if rule.scale != 1.0:
        scores.mul_(rule.scale)
    return scores if rule.cap is None else scores.div_(rule.cap).tanh_().mul_(rule.cap)


def _block(raw: torch.Tensor, targets: torch.Tensor, rule: LogitRule, *, slopes: bool) -> torch.Tensor:
    logits = _ruled(raw.float(), rule)  # float32 scores are overwritten
    log_total = logits.logsumexp(dim=1, keepdim=True)
    logps = (logits.gather(1, targets) - log_total).squeeze(1)
    if slopes:
        raw.copy_(_slopes(logits, log_total, targets, rule))
    return logps


def _slopes(logits: torch.Tensor, log_total: torch.Tensor, targets: torch.Tensor, rule: LogitRule) -> torch.Tensor:
    """(1[v = y] - p_v) dl_v / dx_v, [R, V]; overwrites the logits."""
    inner = None if rule.cap is None else 1 - (logits / rule.cap).square_()
    slopes = logits.sub_(log_total).exp_().neg_()
    slopes.scatter_add_(1, targets, torch.ones_like(targets, dtype=slopes.dtype))
    if inner is not None:
        slopes.mul_(inner)
    return slopes if rule.scale == 1.0 else slopes.mul_(rule.scale)


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        rule: LogitRule,
    ) -> torch.Tensor:
        logps = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        stored = torch.empty_like(hidden) if hidden.requires_grad else None
        for start in range(0, hidden.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            raw = _raw(hidden[rows], weight, bias)
            logps[rows] = _to_logps(raw, targets[rows], rule, slopes=stored is not None)
            if stored is not None:
                stored[rows] = raw @ weight
        ctx.save_for_backward(stored)
        return logps

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (torch calls it by position)
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None, None]:
        (stored,) = ctx.saved_tensors
        (grad,) = grad_outputs
        return grad.unsqueeze(1).to(stored.dtype) * stored, None, None, None, None


class _TrainableHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        rule: LogitRule,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.rule = rule
        return _FrozenHead.forward(_Nothing(), hidden.detach(), weight, bias, targets, rule)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (torch calls it by position)
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, None, None]:
        hidden, weight, bias, targets = ctx.saved_tensors
        (grad,) = grad_outputs
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        bias_grad = weight_grad.new_zeros(weight.shape[0])
        for start in range(0, hidden.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            slopes = _raw(hidden[rows], weight, bias).float()  # the gradient of the head is gathered in float32
            _to_logps(slopes, targets[rows], ctx.rule, slopes=True)
            slopes.mul_(grad[rows].unsqueeze(1))
            hidden_grad[rows] = slopes.to(weight.dtype) @ weight
            weight_grad.addmm_(slopes.T, hidden[rows].float())
            bias_grad += slopes.sum(0)
        return hidden_grad, weight_grad.to(weight.dtype), None if bias is None else bias_grad.to(bias.dtype), None, None


class _Nothing:
    """A context that keeps no tensors: the trainable head saves other ones."""

    def save_for_backward(self, *_tensors: torch.Tensor | None) -> None:
        return None
