"""Settings of `prefpipe train`, named as in transformers.TrainingArguments and TRL's DPOConfig where they have them."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from prefpipe.config import shared
from prefpipe.config.base import PATH, RUNTIME, STRICT

Loss = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "sppo",
    "apo_zero", "apo_down", "dpop", "rdpo", "margin", "odpo", "soft", "rainbow", "simpo", "alphapo", "cpo", "orpo",
    "nll", "kto", "apo_zero_unpaired", "plackett_luce",
]  # fmt: skip
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]
_H = ("beta", "ld_alpha")  # of a loss of the log-ratios of a pair
_GAMMA = ("simpo_gamma", "simpo_gamma_beta_ratio")
_CLASSES = ("beta", "desirable_weight", "undesirable_weight")
# Which settings a loss reads. A setting that none of the chosen losses reads may only have its default.
READS: dict[str, tuple[str, ...]] = {
    "sigmoid": (*_H, "label_smoothing"),
    "sigmoid_norm": (*_H, "label_smoothing"),
    "hinge": _H,
    "ipo": (*_H, "ipo_reduction"),
    "robust": (*_H, "label_smoothing"),
    "exo_pair": (*_H, "label_smoothing"),
    "nca_pair": _H,
    "bco_pair": _H,
    "sppo_hard": _H,
    "sppo": _H,
    "apo_zero": _H,
    "apo_down": _H,
    "dpop": (*_H, "dpop_lambda"),
    "rdpo": (*_H, "rdpo_alpha"),
    "margin": (*_H, "margin_alpha"),
    "odpo": (*_H, "margin_alpha"),
    "soft": _H,
    "rainbow": ("beta", "rainbow_mix", "rainbow_margin"),
    "simpo": ("beta", *_GAMMA, "label_smoothing"),
    "alphapo": ("beta", *_GAMMA, "alphapo_alpha"),
    "cpo": ("beta", "label_smoothing"),
    "orpo": ("beta", "nll_scope"),
    "nll": ("nll_scope",),
    "kto": (*_CLASSES, "kl_bank_size", "kl_rows"),
    "apo_zero_unpaired": _CLASSES,
    "plackett_luce": ("beta",),
}
PAIR_LOSSES = tuple(name for name in READS if name not in ("kto", "apo_zero_unpaired", "plackett_luce"))
_LARGEST_MARGIN = 2.0  # nats per token: SimPO's published margins are 0.1 to 0.5


class TrainConfig(BaseModel):
    """Train a LoRA policy on pairs, labels or ranked groups with cached reference log-probs: one model in memory."""

    model_config = STRICT

    model: shared.Model = shared.DEFAULT_MODEL
    adapter: shared.Adapter = "none"
    pairs: Annotated[tuple[str, ...], PATH] = ()
    """Run directories of `prefpipe build-pairs`, or JSONL/Parquet files with `prompt`, `chosen`, `rejected`."""
    labels: Annotated[tuple[str, ...], PATH] = ()
    """For kto: run directories with labels, or JSONL/Parquet files with `prompt`, `completion`, `label`."""
    groups: Annotated[tuple[str, ...], PATH] = ()
    """For plackett_luce: run directories with ranked groups of completions."""
    ref_logps: Annotated[tuple[str, ...], PATH] = ()
    """Runs of `prefpipe score` or `generate` whose reference log-probs take the place of those in the rows."""
    chat_template: shared.ChatTemplate = "model"
    loss_type: tuple[Loss, ...] = ("sigmoid",)
    """Losses to add up, as in TRL: sigmoid (DPO), nll (mean per-token NLL of the chosen completion), ipo, kto, simpo,
    orpo ...; docs/losses.md says which to choose."""
    loss_weights: tuple[float, ...] = (1.0,)
    """Weight of each loss in loss_type."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Temperature of the implicit reward beta * (logp - ref_logp), per summed nat; per nat per token for sigmoid_norm,
    rainbow, simpo and alphapo; tau of ipo; the weight lambda of orpo's odds ratio."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a preference is flipped: cDPO with sigmoid, robust DPO with robust; exo_pair needs one."""
    ld_alpha: Annotated[float, Field(ge=0, le=1)] = 1.0
    """LD-DPO: weight of the tokens beyond the length of the shorter side, under policy and reference alike."""
    ipo_reduction: Literal["sum", "mean"] = "sum"
    """ipo: the target 1/(2 beta) is in nats per sequence (sum, the paper) or per token (mean, TRL)."""
    simpo_gamma: Annotated[float, Field(ge=0)] = 0.0
    """simpo, alphapo: target margin gamma; 0 takes it from simpo_gamma_beta_ratio."""
    simpo_gamma_beta_ratio: Annotated[float, Field(ge=0)] = 0.5
    """simpo, alphapo: target margin as gamma / beta, in nats per token; not together with simpo_gamma."""
    alphapo_alpha: Annotated[float, Field(gt=0)] = 0.25
    """alphapo: shape of the reward (1 - p^-alpha) / alpha."""
    dpop_lambda: Annotated[float, Field(ge=0)] = 50.0
    """dpop: weight of the penalty on a chosen completion that falls below the reference."""
    rdpo_alpha: float = 0.01
    """rdpo: weight of the difference of lengths, in reward per token."""
    margin_alpha: Annotated[float, Field(ge=0)] = 1.0
    """margin, odpo: weight of reward_gap, or of its logarithm."""
    rainbow_mix: Annotated[float, Field(ge=0, le=1)] = 0.25
    """rainbow: share of the reference's mean log-probs."""
    rainbow_margin: Annotated[float, Field(ge=0)] = 0.1
    """rainbow: target margin in nats per token."""
    nll_scope: Literal["response", "prompt_response"] = "response"
    """nll, orpo: what the NLL covers, the chosen completion or its prompt too (as the authors' ORPO does)."""
    desirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """kto, apo_zero_unpaired: lambda_D; lambda_D n_D / (lambda_U n_U) belongs in [1, 3/2]."""
    undesirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """kto, apo_zero_unpaired: lambda_U."""
    kl_bank_size: Annotated[int, Field(ge=1)] = 256
    """kto: mismatched rows to build for its reference point z0, where the data brings none."""
    kl_rows: Annotated[int, Field(ge=1)] = 16
    """kto: mismatched rows that every step looks at (a forward pass each, without gradient)."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after warmup: linear or cosine to zero, or constant."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of all steps over which the learning rate rises from zero."""
    num_train_epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over the rows."""
    train_batch_size: Annotated[int, Field(ge=1)] = 8
    """Pairs, labels or groups in one optimizer step, whatever the micro-batches."""
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
    """Rows re-scored before step 0 to prove that the cached reference log-probs belong to this model."""
    group_by_prompt: bool = False
    """Draw the pairs or groups of a prompt into the same step: a forward is shared, gradients are correlated."""
    max_tokens_per_micro_batch: Annotated[int, RUNTIME, Field(ge=0)] = 0
    """Token budget of one forward pass, 0 to fit the free memory; it never changes the result beyond rounding."""
    distributed: Annotated[Literal["ddp", "fsdp2"], RUNTIME] = "ddp"
    """Under torchrun: replicate the model on every rank (ddp), or cut its parameters over the ranks (fsdp2)."""
    save_steps: Annotated[int, RUNTIME, Field(ge=1)] = 50
    """Optimizer steps between checkpoints."""
    strict: Annotated[bool, RUNTIME] = False
    """End the run with exit code 3 when a STOP rule of docs/diagnostics.md fires; the last checkpoint stays."""
    report_to: Annotated[tuple[Tracker, ...], RUNTIME] = ()
    """Trackers that get the metrics beside metrics.jsonl; local and offline unless their own settings say otherwise."""

    @model_validator(mode="after")
    def _settings_fit_losses(self) -> "TrainConfig":
        problems = list(self._misfits())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _misfits(self) -> Iterator[str]:
        if len(self.loss_weights) != len(self.loss_type):
            yield f"{len(self.loss_type)} losses but {len(self.loss_weights)} loss_weights: give one each"
        if len(set(self.loss_type)) != len(self.loss_type):
            yield f"a loss twice in loss_type {self.loss_type}: give it once, with their weight"
        kinds = {name if name not in PAIR_LOSSES else "pairs" for name in self.loss_type}
        if len(kinds) > 1 and kinds != {"kto", "apo_zero_unpaired"}:
            yield f"losses of different kinds of rows do not add up: {', '.join(self.loss_type)}"
        read = {setting for name in self.loss_type for setting in READS[name]}
        for setting in sorted({s for settings in READS.values() for s in settings} - read):
            if getattr(self, setting) != type(self).model_fields[setting].default:
                readers = ", ".join(name for name, settings in READS.items() if setting in settings)
                yield f"{setting} = {getattr(self, setting)} is read by none of {', '.join(self.loss_type)} ({readers})"
        if "exo_pair" in self.loss_type and not self.label_smoothing:
            yield "exo_pair needs label_smoothing above 0: its paper uses 1e-3"
        if {"simpo", "alphapo"} & set(self.loss_type):
            yield from self._margin_misfits()

    def _margin_misfits(self) -> Iterator[str]:
        default = type(self).model_fields["simpo_gamma_beta_ratio"].default
        if self.simpo_gamma and self.simpo_gamma_beta_ratio != default:
            yield "simpo_gamma and simpo_gamma_beta_ratio are two names of one margin: give one of them"
        margin = self.simpo_gamma / self.beta or self.simpo_gamma_beta_ratio
        if margin > _LARGEST_MARGIN:
            yield (
                f"a margin gamma / beta of {margin:g} nats per token is out of reach (limit {_LARGEST_MARGIN:g}): "
                "lower simpo_gamma, or raise beta (SimPO's is 2 to 10)"
            )
