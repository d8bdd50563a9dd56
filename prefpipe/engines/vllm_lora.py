# pyright: basic
# vLLM ships incomplete types.
"""Adapters in vLLM 0.32 on a CPU, where its code is slow or fails for lack of a kernel."""

from typing import Any


def replace_cpu_code() -> None:
    """Use `add_adapter` for linear layers, and the head of the base model for prompt log-probs: vLLM's head picks one
    adapter per sequence, where scoring has many rows per sequence. No adapter here touches the head."""
    from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    def add_lora_linear(
        self: Any, y: Any, x: Any, lora_a_stacked: Any, lora_b_stacked: Any, scale: float, output_slices: Any, **_: Any
    ) -> None:
        add_adapter(y, x, self.token_lora_indices, lora_a_stacked, lora_b_stacked, scale, output_slices)

    def base_logits(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer._get_logits(*args, **kwargs)

    PunicaWrapperCPU.add_lora_linear = add_lora_linear
    LogitsProcessorWithLoRA._get_logits = base_logits


def add_adapter(y: Any, x: Any, slots: Any, a: Any, b: Any, scale: float, widths: tuple[int, ...]) -> None:
    """Add scale * B (A x) to `y` [tokens, sum of widths], in place, for tokens that are for the adapter.

    `x` is [tokens, in]; `slots` [tokens] holds the slot of each token's adapter, -1 for none, and no two adapters.
    A linear layer may be several in one, with `widths` outputs each: `a` and `b` have a tensor [slots, 1, rank, in]
    and [slots, 1, width, rank] for each. vLLM copies both matrices for every token, which costs more than the layer
    itself; here they are read once.
    """
    slot = int(slots.max())
    if slot < 0:
        return
    x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    applies = slots == slot
    share = scale if bool(applies.all()) else scale * applies.to(x.dtype).unsqueeze(1)
    start = 0
    for down, up, width in zip(a, b, widths, strict=True):
        inner = (x @ down[slot, 0].T.to(x.dtype)) * share
        y[:, start : start + width] += (inner @ up[slot, 0].T.to(x.dtype)).to(y.dtype)
        start += width
