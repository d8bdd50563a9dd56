"""Per-token log-probs of completions: the one forward pass that scoring, audit and training share."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, cast, get_args

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from prefpipe.errors import UsageError
from prefpipe.forward.attention import NAME, Row, longrope_edges, why_not_shared
from prefpipe.forward.balance import balance_losses
from prefpipe.forward.head import log_collisions, logit_rule, target_logps
from prefpipe.forward.layout import Layout, Tree, flatten, separate
from prefpipe.forward.separate_rows import batches, separate_states

SCORER_VERSION = 2  # raise it when a change moves the log-probs: cached values of another version are refused
SCORING_TOKENS = 2048  # of one scoring pass; larger ones were slower on CPU (docs/LOG.md)
Rows = Literal["shared", "separate", "single"]  # from the fastest on
ROWS: tuple[Rows, ...] = get_args(Rows)
ROWS_IN_WORDS = {
    "separate": "in a row of its own, in batches of similar lengths",
    "single": "in a row of its own, one after the other",
}
_TOLERANCE = {"float32": 1e-3, "float16": 0.5, "bfloat16": 1.0}  # nats in one token; a wrong mask is off by many


class TreeModel(torch.nn.Module):
    """A causal language model (PEFT-wrapped or not) as a function from a layout to token log-probs.

    It is a module, so that DDP and FSDP2 see one forward call that holds body and head. `rows` is "shared" (token
    trees), or for models that cannot share a row, by the attention of transformers, "separate" (a row for every
    completion, in padded batches) or "single" (one row at a time, where padding would change a value).
    """

    def __init__(self, policy: torch.nn.Module, rows: Rows = "shared") -> None:
        super().__init__()
        self.policy = policy
        # From how many passes this process would make for a layout to how many it makes: as many as every other one,
        # where each pass gathers the parameters of a layer from all of them (FSDP2).
        self.agree: Callable[[int], int] = lambda passes: passes
        self.set_rows(rows)

    def set_rows(self, rows: Rows) -> None:
        """Choose how completions are computed from now on; it decides the attention implementation too."""
        self.rows: Rows = rows
        causal = causal_model(self.policy)
        causal.set_attn_implementation(NAME if rows == "shared" else plain_attention(causal))

    def forward(
        self, layout: Layout, *, collisions: bool = False, balance: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """float32 log-probs [N], in nats, of every scored token of a layout, in its order. With `collisions`
        [2, N]: row 1 is log sum_v p_v^2 of the distribution that the token was drawn from, without gradient. With
        `balance` also the load-balancing loss of every completion [C]."""
        causal = causal_model(self.policy)
        head = cast(torch.nn.Linear, causal.get_output_embeddings())
        layout = layout.to(head.weight.device)
        hidden, *router_logits = self._states(causal, layout, balance=balance)
        states, rule = hidden[layout.sources], logit_rule(causal.config.get_text_config())
        bias = cast(torch.Tensor | None, getattr(head, "bias", None))
        logps = target_logps(states, head.weight, layout.targets, rule, bias)[layout.entries]
        if collisions:
            logps = torch.stack([logps, log_collisions(states, head.weight, rule, bias)[layout.entries]])
        return (logps, balance_losses(causal, router_logits, layout.spans)) if balance else logps

    def plain(self, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
        """Log-probs of one completion [N], on the CPU, by a forward pass of transformers with full logits: it knows
        nothing of trees, chunks of the head or spans."""
        ids = torch.tensor([[*prompt, *completion]], device=causal_model(self.policy).device)
        out = self.policy(input_ids=ids, use_cache=False, logits_to_keep=len(completion) + 1)
        logps = out.logits[0, -len(completion) - 1 : -1].float().log_softmax(-1)
        return logps.gather(1, ids[0, len(prompt) :].unsqueeze(1)).squeeze(1).cpu()

    def layout(self, trees: Sequence[Tree]) -> Layout:
        """A layout of trees for this model; completions and tokens keep the order of `trees`."""
        return flatten(trees if self.rows == "shared" else separate(trees))

    def _states(self, causal: PreTrainedModel, layout: Layout, *, balance: bool) -> list[torch.Tensor]:
        """Hidden states [T, H] and, with `balance`, the router logits [T, E] of every layer with experts."""

        def body(input_ids: torch.Tensor, **options: Any) -> list[torch.Tensor]:
            options |= {"output_router_logits": True} if balance else {}
            out = decoder(causal)(input_ids=input_ids, use_cache=False, **options)
            routers = out.router_logits if balance else ()
            return [out.last_hidden_state, *(logits.reshape(*input_ids.shape, -1) for logits in routers)]

        if self.rows == "shared":
            row, positions = layout.input_ids.unsqueeze(0), layout.position_ids.unsqueeze(0)
            return [tensor[0] for tensor in body(row, position_ids=positions, tree_row=Row(layout.spans))]
        lengths = [s.trunk_length + sum(n for _, n in s.completions) for s in layout.spans]
        alone = [[row] for row in range(len(lengths))]
        numbers = batches(lengths, longrope_edges(causal.config)) if self.rows == "separate" else alone
        spare = self.agree(len(numbers)) - len(numbers)
        return separate_states(body, layout.input_ids.split(lengths), numbers, spare)


def completion_logps(token_logps: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Sum token log-probs [N] into one log-prob per completion [C], in float32."""
    sums = torch.zeros(layout.num_completions, dtype=torch.float32, device=token_logps.device)
    return sums.index_add(0, layout.owners.to(token_logps.device), token_logps)


def plain_attention(causal: PreTrainedModel) -> str:
    """The attention of transformers for a model: SDPA, or eager where SDPA is missing or would drop the score cap."""
    capped = getattr(causal.config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "sdpa" if causal._supports_sdpa and not capped else "eager"  # pyright: ignore[reportPrivateUsage]  (no public name)


def causal_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def decoder(causal: PreTrainedModel) -> torch.nn.Module:
    """The part of a model that makes hidden states of text: without the head, and without the other parts (a vision
    tower) of a model of several kinds of input."""
    found = causal.get_decoder()
    # Where transformers does not find it: the whole model (Llama 4), or the head, which is named so (ModernBERT).
    return causal.model if found in (causal, causal.get_output_embeddings()) else found


@torch.no_grad()
def score(model: TreeModel, trees: Iterable[Tree], max_tokens: int = SCORING_TOKENS) -> Iterator[list[list[float]]]:
    """Log-probs (nats) of the scored tokens of every completion, tree by tree, without gradient; up to `max_tokens` in
    one pass."""
    for packed in pack(trees, max_tokens):
        values = iter(model(model.layout(packed)).tolist())
        for tree in packed:
            yield [[next(values) for _ in range(count)] for count in tree.num_scored]


def pack(trees: Iterable[Tree], max_tokens: int) -> Iterator[list[Tree]]:
    """Neighbouring trees, as many as `max_tokens` holds; a larger tree stands alone."""
    waiting: list[Tree] = []
    load = 0
    for tree in trees:
        if waiting and load + tree.num_tokens > max_tokens:
            yield waiting
            waiting, load = [], 0
        waiting.append(tree)
        load += tree.num_tokens
    if waiting:
        yield waiting


def extremes(trees: Sequence[Tree]) -> list[Tree]:
    """The trees for a self-test: the smallest one, and the one with the longest sequence of prompt and completion, in
    which attention windows and length-dependent positions show; of each its longest and its shortest completion."""
    ends = (min(trees, key=lambda t: t.num_tokens), max(trees, key=lambda t: t.longest_sequence))
    ordered = ((tree.prompt, sorted(tree.completions, key=len)) for tree in ends)
    return [Tree(prompt, [c[-1], c[0]] if len(c) > 1 else c) for prompt, c in ordered]


def settle_rows(model: TreeModel, trees: Sequence[Tree], dtype: str) -> str | None:
    """Choose the fastest rows that are right, by the architecture and by a self-test on `trees`, from the present ones
    on: shared, separate, single.

    Returns why the present ones are left, or None. Raises UsageError when single rows are wrong as well.
    """
    reasons: list[str] = []
    before = model.rows
    for rows in ROWS[ROWS.index(before) :]:
        known = why_not_shared(causal_model(model.policy).config) if rows == "shared" else None
        reason = known or _why_not(model, rows, trees, dtype)
        if reason is None:
            return "; ".join(reasons) or None
        reasons.append(reason)
    model.set_rows(before)
    raise UsageError(
        f"this architecture is not supported yet: {reasons[-1]}", "please report the model; another one will do"
    )


def _why_not(model: TreeModel, rows: Rows, trees: Sequence[Tree], dtype: str) -> str | None:
    """Why rows of this kind are wrong for this model, or None; the model is left set to them."""
    try:
        model.set_rows(rows)
        difference = self_test(model, trees)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return f"its code does not take {rows} rows ({type(error).__name__}: {error})"
    if difference <= _TOLERANCE[dtype]:
        return None
    return f"{rows} rows differ from plain forward passes by {difference:.3g} nats in one token"


@torch.no_grad()
def self_test(model: TreeModel, trees: Sequence[Tree]) -> float:
    """Largest |difference| of a token's log-prob (nats) between this forward pass and plain ones of transformers."""
    if model.rows == "separate":
        trees = [*trees, *map(_cut, trees)]
    ours = [torch.tensor(c) for tree in score(model, trees) for c in tree]
    causal = causal_model(model.policy)
    causal.set_attn_implementation(plain_attention(causal))
    try:
        plain = [model.plain(tree.prompt, c) for tree in trees for c in tree.completions]
    finally:
        model.set_rows(model.rows)
    return max(float((a - b).abs().max()) for a, b in zip(ours, plain, strict=True))


def _cut(tree: Tree) -> Tree:
    """The longest completion without the last 16th of its row: separate rows pad it beside the whole one."""
    longest = max(tree.completions, key=len)
    cut = max(1, (len(tree.prompt) + len(longest)) // 16)
    return Tree(tree.prompt, [longest[: max(1, len(longest) - cut)]])
