"""Checks of single kernels: attention over trees, the head, FlexAttention; values and gradients against the same
formula in a wider number type."""

import inspect
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from card.measure import peak, seconds, typical
from card.record import Fact, Figure
from card.sizes import Bench, Sizes
from card.worker import Found
from prefpipe.forward import head
from prefpipe.forward.attention import KERNEL, Row, tree_attention
from prefpipe.forward.layout import Layout, Tree, flatten

PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl")
# An error may be so many times that of the plain formula in the same number type: of values and of gradients in 16
# bits, and of both in float32, where the plain formula may be exact by luck.
LIMITS, LIMIT_FLOAT32 = (2.0, 3.0), 8.0
CAP = 5.0  # a score cap that random scores do feel
Tensors = list[torch.Tensor]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def machine(bench: Bench) -> Found:
    """The card, versions, the arguments of the variable-length kernel, and what the card reaches in a large matrix
    product and a large copy: the limits that other checks are measured by."""
    device, dtype = bench.sizes.device, bench.sizes.dtype
    yield Fact("machine", f"{_card(device)}, Python {platform.python_version()}")
    yield Fact("versions", ", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    yield Fact("varlen_attn", str(inspect.signature(varlen_attn)))
    side = 8192 if device.type == "cuda" else 256
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    rate = 2 * side**3 / typical(lambda: left @ right, device, times=5)
    bench.ceiling = rate
    yield Figure("matrix product", rate / 1e12, "TFLOP/s")
    yield Figure("copy", 2 * left.nbytes / typical(left.clone, device, times=5) / 1e9, "GB/s")


def limit_of(bench: Bench) -> float:
    """Operations a second of a large matrix product; measured here where `machine` ran in another process."""
    if bench.ceiling is None:
        for _ in machine(bench):
            pass
    assert bench.ceiling is not None
    return bench.ceiling


def attention(bench: Bench) -> Found:
    """Attention over trees as a model calls it, values and gradients, for groups of heads, sizes, windows and a cap."""
    sizes, layout = bench.sizes, _layout(bench.sizes)
    for heads in sizes.heads:
        for rule in _rules(sizes):
            inputs = _inputs(sizes, heads, len(layout.input_ids))
            yield Fact(f"attention, {rule.named(heads)}", _way(rule, inputs))
            yield from _errors(rule.named(heads), rule.trees(layout), inputs, rule.products(layout, sizes.device))
    yield from _copies(sizes, layout)


def _copies(sizes: Sizes, layout: Layout) -> Found:
    """How long forward and backward of the copies of the keys take, by the two ways to write them."""
    keys = _inputs(sizes, sizes.heads[0], len(layout.input_ids))[1]
    rows = Row(layout.spans).plan(sizes.device).key_rows
    for name, copied in (("index", lambda t: t[rows]), ("index_select", lambda t: t.index_select(0, rows))):
        work = _both(lambda t, c=copied: c(t[0].transpose(0, 1)), [keys])
        yield Figure(f"copies of keys by {name}", typical(work, sizes.device) * 1e3, "ms")


def flex(bench: Bench) -> Found:
    """Compiled FlexAttention over the same trees, which could take the place of plain products where a model caps its
    scores, of SDPA in float32, and of a kernel without windows. It has no backward on a CPU."""
    sizes, layout = bench.sizes, _layout(bench.sizes)
    on_card = sizes.device.type == "cuda"
    attend: Any = torch.compile(flex_attention, dynamic=True) if on_card else flex_attention
    count = len(layout.input_ids)
    for heads in sizes.heads[:2]:
        for rule in _rules(sizes):
            name, inputs = rule.named(heads), _inputs(sizes, heads, count, gradients=on_card)
            blocks = create_block_mask(rule.sees(layout, sizes.device), None, None, count, count, sizes.device)
            options = {"block_mask": blocks, "enable_gqa": True, "score_mod": rule.capped() if rule.cap else None}

            def trees(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: Any = options) -> torch.Tensor:
                return attend(q, k, v, **o).transpose(1, 2)

            yield Figure(f"{name}: first pass, with its compilation", seconds(_both(trees, inputs), sizes.device), "s")
            yield from _errors(name, trees, inputs, rule.products(layout, sizes.device))
            yield Figure(f"{name}: a pass", typical(_both(trees, inputs), sizes.device) * 1e3, "ms")
            ours = typical(_both(rule.trees(layout), inputs), sizes.device)
            yield Figure(f"{name}: the same by tree attention", ours * 1e3, "ms")


def output_head(bench: Bench) -> Found:
    """The chunked head against full logits, and its speed and memory by the rows of a chunk."""
    sizes = bench.sizes
    config, states = sizes.large, min(sizes.states, 2048)
    generator = torch.Generator(sizes.device).manual_seed(0)
    hidden = torch.randn(states, config.hidden_size, generator=generator, device=sizes.device).to(sizes.dtype)
    weight = torch.randn(config.vocab_size, config.hidden_size, generator=generator, device=sizes.device)
    weight = (weight * 0.02).to(sizes.dtype)
    targets = torch.randint(config.vocab_size, (states,), generator=generator, device=sizes.device)
    hidden.requires_grad_()

    def full(at: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        return _at_least_float32(at @ of.T).log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)

    found = _value_and_gradients(lambda h: head.target_logps(h, weight, targets), [hidden])
    plain = _value_and_gradients(lambda h: full(h, weight), [hidden])
    exact = _value_and_gradients(lambda h: full(h, _wider(weight)), [_wider(hidden)])
    yield _error("log-probs, chunked head", found[0], plain[0], exact[0])
    yield _error("gradient of the states, chunked head", found[1], plain[1], exact[1], gradient=True)
    del found, plain, exact
    many = hidden.detach().repeat(-(-sizes.states // states), 1)[: sizes.states].requires_grad_()
    goals = targets.repeat(-(-sizes.states // states))[: sizes.states]
    for chunk in sizes.chunks:
        with patch.object(head, "CHUNK", chunk):
            work = _both(lambda h: head.target_logps(h, weight, goals), [many])
            taken = typical(work, sizes.device)
            yield Figure(f"chunks of {chunk}", sizes.states / taken, "tokens/s")
            yield Figure(f"chunks of {chunk}: peak", peak(work, sizes.device) / 2**30, "GiB")


def _layout(sizes: Sizes) -> Layout:
    """Two trees: one with completions of several lengths, one with a prompt of a single token."""
    answers = [[number] * length for number, length in enumerate(sizes.completions, start=5)]
    return flatten([Tree([3] * sizes.trunk, answers), Tree([4], answers[:2])])


def _inputs(sizes: Sizes, heads: tuple[int, int, int], count: int, *, gradients: bool = True) -> Tensors:
    queries, groups, size = heads
    generator = torch.Generator(sizes.device).manual_seed(0)
    shapes = ((1, number, count, size) for number in (queries, groups, groups))
    made = (torch.randn(shape, generator=generator, device=sizes.device).to(sizes.dtype) for shape in shapes)
    return [tensor.requires_grad_(gradients) for tensor in made]


@dataclass(frozen=True)
class Rule:
    """What a layer adds to plain attention: a window, or a cap on its scores."""

    window: int | None = None
    cap: float | None = None

    def named(self, heads: tuple[int, int, int]) -> str:
        """Heads and rule in words."""
        window = "" if self.window is None else f", window {self.window}"
        return f"{heads[0]}:{heads[1]} heads of {heads[2]}{window}{'' if self.cap is None else f', cap {self.cap:g}'}"

    def trees(self, layout: Layout) -> Attend:
        """Attention over trees, as a model calls it: [1, T, H, D]."""
        row, nobody = Row(layout.spans), torch.nn.Identity()
        options: dict[str, Any] = {"tree_row": row, "sliding_window": self.window, "softcap": self.cap}
        return lambda q, k, v: tree_attention(nobody, q, k, v, None, **options)[0]

    def products(self, layout: Layout, device: torch.device) -> Attend:
        """The formula in plain products; softmax in float32 at least."""
        places = torch.arange(len(layout.input_ids), device=device)
        mask = self.sees(layout, device)(None, None, places[:, None], places[None, :])

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            repeats = query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
            scores = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
            scores = scores if self.cap is None else self.cap * torch.tanh(scores / self.cap)
            weights = _at_least_float32(scores).masked_fill(~mask, -torch.inf).softmax(-1)
            return (weights.to(value.dtype) @ value).transpose(1, 2)

        return attend

    def sees(self, layout: Layout, device: torch.device) -> Callable[..., torch.Tensor]:
        """(batch, head, query, key) -> whether the query sees the key."""
        count = len(layout.input_ids)
        tree, part = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long)
        for number, span in enumerate(layout.spans):
            tree[span.start : span.start + span.trunk_length] = number
            for own, (start, length) in enumerate(span.completions, start=1):
                tree[start : start + length] = number
                part[start : start + length] = own
        tree, part, position = (tensor.to(device) for tensor in (tree, part, layout.position_ids))

        def sees(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            ahead = position[query] - position[key]
            seen = (tree[query] == tree[key]) & ((part[key] == 0) | (part[key] == part[query])) & (ahead >= 0)
            return seen if self.window is None else seen & (ahead < self.window)

        return sees

    def capped(self) -> Callable[..., torch.Tensor]:
        """(score, batch, head, query, key) -> the score under the cap."""
        return lambda score, *_place: self.cap * torch.tanh(score / self.cap)


def _way(rule: Rule, inputs: Tensors) -> str:
    """Which of the ways tree attention takes."""
    if rule.cap is not None:
        return "plain products"
    kernel = inputs[0].is_cuda and KERNEL.takes(inputs[0], inputs[2], rule.window)
    return "variable-length kernel" if kernel else "SDPA tree by tree"


def _rules(sizes: Sizes) -> tuple[Rule, ...]:
    return Rule(), Rule(window=sizes.window), Rule(cap=CAP)


def _errors(name: str, attend: Attend, inputs: Tensors, products: Attend) -> Iterator[Figure]:
    """Errors of the output and, where the inputs have them, of the three gradients against `products` in a wider number
    type."""
    wide = [_wider(tensor) for tensor in inputs]
    found, plain, exact = (_value_and_gradients(*f) for f in ((attend, inputs), (products, inputs), (products, wide)))
    for part, ours, theirs, truth in zip(("output", "dq", "dk", "dv"), found, plain, exact, strict=False):
        yield _error(f"{name}: {part}", ours, theirs, truth, gradient=part != "output")


def _error(
    name: str, found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, *, gradient: bool = False
) -> Figure:
    """The largest error over that of the plain formula in the same number type, which is taken as no smaller than the
    rounding of the largest value."""
    ours, theirs = (float((tensor.to(exact.dtype) - exact).abs().max()) for tensor in (found, plain))
    rounding = float(exact.abs().max()) * torch.finfo(found.dtype).eps
    limit = LIMIT_FLOAT32 if found.dtype == torch.float32 else LIMITS[gradient]
    return Figure(f"error of {name}", ours / max(theirs, rounding), "x plain", limit, at_most=True)


def _wider(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in float64 of float32, in float32 of 16 bits."""
    dtype = torch.float64 if tensor.dtype == torch.float32 else torch.float32
    return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _value_and_gradients(work: Callable[..., torch.Tensor], inputs: Tensors) -> Tensors:
    out = work(*inputs)
    if not inputs[0].requires_grad:
        return [out]
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, slope)]


def _both(work: Callable[..., torch.Tensor], inputs: Tensors) -> Callable[[], object]:
    """Forward and, where the inputs have gradients, backward as one piece of work."""

    def both() -> object:
        out = work(*inputs)
        return torch.autograd.grad(out, inputs, torch.ones_like(out)) if inputs[0].requires_grad else out

    return both


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _card(device: torch.device) -> str:
    if device.type != "cuda":
        return f"no card ({platform.machine()}, {torch.get_num_threads()} threads): tiny sizes, figures mean nothing"
    properties = torch.cuda.get_device_properties(device)
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which(command[0]) else None
    driver = asked.stdout.splitlines()[0] if asked and asked.returncode == 0 and asked.stdout else "unknown"
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, driver {driver}, CUDA {torch.version.cuda}"
