"""What the checks are run on: models with random weights in the shapes of real ones, rows of random tokens, and the
same in sizes that a CPU computes in seconds."""

import copy
import gc
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from prefpipe.forward import attention, load
from prefpipe.forward.logps import TreeModel
from prefpipe.stages.train.examples import TrainPair

LLAMA_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=131072, head_dim=128, bos_token_id=128000, eos_token_id=128001,
    rope_parameters={"rope_type": "default", "rope_theta": 5e5}, tie_word_embeddings=False,
)  # fmt: skip
QWEN_1_5B = Qwen2Config(
    vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
    num_key_value_heads=2, max_position_embeddings=131072, head_dim=128, bos_token_id=151643, eos_token_id=151643,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True,
)  # fmt: skip
_TINY: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 8,
    "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Pairs of prompts of `prompt` tokens with completions of `completion` tokens: with two completions to a prompt
    `prompts` pairs, with more every one of the first half against every one of the second."""

    prompt: int
    completion: int
    completions: int = 2
    prompts: int = 8

    @property
    def name(self) -> str:
        """Tokens of prompt and completion, and completions to a prompt."""
        return f"{self.prompt}/{self.completion} K={self.completions}"


@dataclass(frozen=True)
class Sizes:
    """The sizes of all checks."""

    device: torch.device
    dtype: torch.dtype
    small: PreTrainedConfig
    large: PreTrainedConfig
    # Query heads, key/value heads and head size of attention, and the tokens of its trunk and of its completions.
    heads: tuple[tuple[int, int, int], ...]
    trunk: int
    completions: tuple[int, ...]
    window: int
    # Rows of the head, and rows of one product with it.
    states: int
    chunks: tuple[int, ...]
    # Steps of the small model, the two of TRL before the others; of the large one; tokens of a scoring pass.
    cases: tuple[Case, ...]
    large_case: Case
    long: Case
    packs: tuple[int, ...]
    # Tokens of a micro-batch of the small model, and of the large one without checkpointing.
    tokens: int
    large_tokens: int


def real(device: torch.device) -> Sizes:
    """On a card of 80 GB or more."""
    return Sizes(
        device=device, dtype=torch.bfloat16, small=QWEN_1_5B, large=LLAMA_8B,
        heads=((32, 8, 128), (12, 2, 128), (32, 8, 64), (16, 16, 64)), trunk=700, completions=(300, 1, 450), window=256,
        states=8192, chunks=(256, 1024, 4096),
        cases=(
            Case(512, 512), Case(3072, 1024, prompts=4), Case(3072, 1024, 8, prompts=1), Case(410, 3686, prompts=2),
            Case(3686, 410, prompts=4),
        ),
        large_case=Case(512, 512, prompts=4), long=Case(32768, 2048, prompts=1), packs=(2048, 8192, 32768),
        tokens=12288, large_tokens=3072,
    )  # fmt: skip


def tiny(device: torch.device) -> Sizes:
    """What a CPU does in seconds: the same code on other numbers."""
    return Sizes(
        device=device, dtype=torch.float32,
        small=Qwen2Config(**_TINY, num_attention_heads=6, num_key_value_heads=1, tie_word_embeddings=True),
        large=LlamaConfig(**_TINY, num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=False),
        heads=((4, 1, 8), (6, 1, 16)), trunk=23, completions=(9, 1, 12), window=6, states=40, chunks=(8, 16),
        cases=(Case(12, 12, prompts=2), Case(24, 8, 4, prompts=1)), large_case=Case(16, 16, prompts=2),
        long=Case(256, 16, prompts=1), packs=(64, 128), tokens=96, large_tokens=64,
    )  # fmt: skip


@dataclass
class Bench:
    """The sizes, and what checks leave for those behind them."""

    sizes: Sizes
    # Operations a second that the card reaches in a matrix product, once it was measured.
    ceiling: float | None = None
    kept: dict[str, Any] = field(default_factory=dict[str, Any])

    def lora(self, config: PreTrainedConfig) -> TreeModel:
        """A model of a shape with random weights and a new adapter; the one of before is dropped when the shape is
        another, and kept when it is the same."""
        if self.kept.get("shape") is not config:
            self.kept.clear()
            self.release()
            self.kept = {"shape": config, "model": TreeModel(with_lora(build(config, self.sizes)))}
        return self.kept["model"]

    def drop(self) -> None:
        """Drop the model: what was done to it must not reach the next check."""
        self.kept.clear()
        self.release()

    def release(self) -> None:
        """Free what is not in use. Raises RuntimeError where the card answers no more."""
        gc.collect()
        if self.sizes.device.type == "cuda":
            torch.cuda.synchronize(self.sizes.device)
            torch.cuda.empty_cache()


def build(config: PreTrainedConfig, sizes: Sizes, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A frozen model with random weights, made on the card."""
    attention.register()
    torch.manual_seed(0)
    with sizes.device:  # a copy of the config: a model writes its attention into it
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype or sizes.dtype)
    return model.requires_grad_(requires_grad=False).eval()


def with_lora(model: PreTrainedModel) -> PeftModel:
    """The model with a new adapter, as `prefpipe train` makes it."""
    return load.add_lora(model, r=16, alpha=32, target_modules="all-linear", seed=0)


def rows(case: Case, vocabulary: int) -> list[TrainPair]:
    """The pairs of a case: random tokens, and reference log-probs of one nat each."""
    source = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(source.choices(range(3, vocabulary), k=count))

    made: list[TrainPair] = []
    for _ in range(case.prompts):
        prompt, answers = ids(case.prompt), [ids(case.completion) for _ in range(case.completions)]
        reference, half = (-1.0,) * case.completion, case.completions // 2
        made += [
            TrainPair(f"{len(made)}/{c}/{r}", "", "", prompt, answers[c], answers[r], reference, reference, 1.0)
            for c in range(half)
            for r in range(half, case.completions)
        ]
    return made
