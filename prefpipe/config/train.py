"""Settings of `prefpipe train`, named as in transformers.TrainingArguments and TRL's DPOConfig where they have them."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from prefpipe.config import shared
from prefpipe.config.base import PATH, RUNTIME, STRICT


class TrainConfig(BaseModel):
    """Train a LoRA policy on pairs with cached reference log-probs: one model in memory."""

    model_config = STRICT

    model: shared.Model = shared.DEFAULT_MODEL
    adapter: shared.Adapter = "none"
    pairs: Annotated[tuple[str, ...], PATH] = ()
    """Run directories of `prefpipe build-pairs`, or JSONL/Parquet files with `prompt`, `chosen`, `rejected`."""
    chat_template: shared.ChatTemplate = "model"
    loss_type: tuple[Literal["sigmoid", "nll"], ...] = ("sigmoid",)
    """Losses to add up, as in TRL: sigmoid (DPO), nll (mean per-token NLL of the chosen completion)."""
    loss_weights: tuple[float, ...] = (1.0,)
    """Weight of each loss in loss_type."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Temperature of the implicit reward: beta * (logp - ref_logp), per summed nat."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after warmup: linear or cosine to zero, or constant."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of all steps over which the learning rate rises from zero."""
    num_train_epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over the pairs."""
    train_batch_size: Annotated[int, Field(ge=1)] = 8
    """Pairs in one optimizer step, whatever the micro-batches."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this global norm."""
    lora_r: Annotated[int, Field(ge=1)] = 16
    """Rank of the LoRA adapter; a continued adapter keeps its own."""
    lora_alpha: Annotated[int, Field(ge=1)] = 32
    """LoRA scale is lora_alpha / lora_r."""
    lora_target_modules: str = "all-linear"
    """Adapted modules: all-linear (without the head), or names joined by commas."""
    dtype: shared.Dtype = "bfloat16"
    seed: shared.Seed = 0
    audit_rows: Annotated[int, Field(ge=1)] = 32
    """Pairs re-scored before step 0 to prove that the cached reference log-probs belong to this model."""
    group_by_prompt: bool = False
    """Draw the pairs of a prompt into the same step: they share its forward pass, their gradients are correlated."""
    max_tokens_per_micro_batch: Annotated[int, RUNTIME, Field(ge=0)] = 0
    """Token budget of one forward pass, 0 to fit the free memory; it never changes the result beyond rounding."""
    distributed: Annotated[Literal["ddp", "fsdp2"], RUNTIME] = "ddp"
    """Under torchrun: replicate the model on every rank (ddp), or cut its parameters over the ranks (fsdp2)."""
    save_steps: Annotated[int, RUNTIME, Field(ge=1)] = 50
    """Optimizer steps between checkpoints."""

    @model_validator(mode="after")
    def _weights_match_losses(self) -> "TrainConfig":
        if len(self.loss_weights) != len(self.loss_type):
            raise ValueError(f"{len(self.loss_type)} losses but {len(self.loss_weights)} loss_weights: give one each")
        return self
