"""Settings of `prefpipe train`, named as in transformers.TrainingArguments and TRL's DPOConfig where they have them."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from prefpipe.config import shared
from prefpipe.config.base import PATH, RUNTIME, STRICT

Loss = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "sppo",
    "apo_zero",
    "apo_down",
    "dpop",
    "rdpo",
    "margin",
    "odpo",
    "soft",
    "rainbow",
    "simpo",
    "alphapo",
    "cpo",
    "orpo",
    "nll",
    "kto",
    "apo_zero_unpaired",
    "plackett_luce",
]
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]
_H = ("beta", "ld_alpha")  # of a loss of the log-ratios of a pair
_GAMMA = ("simpo_gamma", "simpo_gamma_beta_ratio")
_CLASSES = ("beta", "desirable_weight", "undesirable_weight")
# Which settings a loss reads. A setting that none of the chosen losses reads may only have its default.
_READS: dict[str, tuple[str, ...]] = {
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
PAIR_LOSSES = tuple(name for name in _READS if name not in ("kto", "apo_zero_unpaired", "plackett_luce"))
ROWS: dict[str, Literal["pairs", "labels", "groups"]] = {  # what a loss trains on
    **dict.fromkeys(PAIR_LOSSES, "pairs"),
    **dict.fromkeys(("kto", "apo_zero_unpaired"), "labels"),
    "plackett_luce": "groups",
}
READS = {name: (*own, "use_weighting") if name in PAIR_LOSSES else own for name, own in _READS.items()}
LORA_ONLY = (
    "lora_r",
    "lora_alpha",
    "use_rslora",
    "lora_dropout",
    "lora_target_modules",
    "load_in_4bit",
    "merge",
)
UNAVAILABLE = "unavailable"  # the reference_model that is not at hand
_LARGEST_MARGIN = 2.0  # nats per token: SimPO's published margins are 0.1 to 0.5


class TrainConfig(BaseModel):
    """Train a policy on pairs, labels or ranked groups with cached reference log-probs: one model in memory."""

    model_config = STRICT

    model: shared.Model = shared.DEFAULT_MODEL
    adapter: shared.Adapter = "none"
    pairs: Annotated[tuple[str, ...], PATH] = ()
    """Run directories of `prefpipe build-pairs`, or JSONL/Parquet files with `prompt`, `chosen`, `rejected`."""
    labels: Annotated[tuple[str, ...], PATH] = ()
    """For kto: run directories with labels, or JSONL/Parquet files with `prompt`, `completion`, `label`."""
    groups: Annotated[tuple[str, ...], PATH] = ()
    """For plackett_luce: run directories with ranked groups of completions."""
    eval_pairs: Annotated[tuple[str, ...], PATH] = ()
    """Pairs to evaluate on, as in pairs; eval_split takes rows from the training rows instead."""
    eval_labels: Annotated[tuple[str, ...], PATH] = ()
    """Labels to evaluate on, as in labels; kto's reference point is then that of mismatched rows of their own."""
    eval_groups: Annotated[tuple[str, ...], PATH] = ()
    """Ranked groups to evaluate on, as in groups."""
    ref_logps: Annotated[tuple[str, ...], PATH] = ()
    """Runs of `prefpipe score` or `generate` whose reference log-probs take the place of those in the rows."""
    reference_model: Annotated[str, PATH] = "policy"
    """Model that the reference log-probs are of: policy (the one that is trained, with its adapter on or off), another
    one (as in model), which is loaded first to check them, or unavailable: they are taken as they are, unchecked."""
    reference_adapter: Annotated[str, PATH] = "none"
    """Directory of the reference's PEFT LoRA adapter on top of reference_model, or 'none'."""
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
    use_weighting: bool = False
    """WPO: weigh every pair by how likely the policy itself would be to say both completions."""
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
    optim: Literal["adamw_torch_fused", "rmsprop", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = (
        "adamw_torch_fused"
    )
    """Optimizer, on float32 master weights; the 8-bit and the paged ones come from the package bitsandbytes."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Decay after warmup: linear or cosine to zero; constant has no warmup, constant_with_warmup has."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of all steps over which the learning rate rises from zero."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """The same in steps, in place of warmup_ratio; 0 leaves it to warmup_ratio."""
    num_train_epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over the rows."""
    train_batch_size: Annotated[int, Field(ge=1)] = 8
    """Pairs, labels or groups in one optimizer step, whatever the micro-batches."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of AdamW; L2 penalty of rmsprop."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this global norm."""
    tuning: Literal["lora", "full"] = "lora"
    """What is trained: a LoRA adapter on the frozen model, or every weight of the model (OUT/model is a new model)."""
    lora_r: Annotated[int, Field(ge=1)] = 16
    """Rank of the LoRA adapter; a continued adapter keeps its own, as it does scale and targets."""
    lora_alpha: Annotated[int, Field(ge=1)] = 32
    """LoRA scale is lora_alpha / lora_r."""
    use_rslora: bool = False
    """Scale lora_alpha / sqrt(lora_r) instead (rank-stabilised LoRA, arXiv:2312.03732)."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout in front of the adapter while it trains; the model's own dropout is always off."""
    lora_target_modules: str = "all-linear"
    """Adapted modules: all-linear (without the head), or names joined by commas."""
    load_in_4bit: bool = False
    """QLoRA: the frozen weights in 4 bits (nf4, double quantization) through the package bitsandbytes."""
    merge: bool = False
    """Write OUT/merged too: the model with the trained adapter in its weights, for tools that take no adapters."""
    dtype: shared.Dtype = "bfloat16"
    seed: shared.Seed = 0
    audit_rows: Annotated[int, Field(ge=1)] = 32
    """Rows re-scored before step 0 to prove that the cached reference log-probs belong to this model."""
    group_by_prompt: bool = False
    """Draw the pairs or groups of a prompt into the same step: a forward is shared, gradients are correlated."""
    eval_split: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the prompts whose rows are left out of training and evaluated on; a prompt is never on both sides."""
    eval_steps: Annotated[int, Field(ge=1)] = 50
    """Optimizer steps between evaluations; the last step is always followed by one."""
    load_best_model_at_end: bool = False
    """Keep the weights of the best evaluation instead of the last ones."""
    metric_for_best_model: Literal["eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"] = "eval_loss"
    """What makes an evaluation the best: the lowest loss, or the highest accuracy or margin."""
    early_stopping_patience: Annotated[int, Field(ge=0)] = 0
    """Stop after so many evaluations in a row without a new best; 0 never stops early."""
    max_tokens_per_micro_batch: Annotated[int, RUNTIME, Field(ge=0)] = 0
    """Token budget of one forward pass, 0 to fit the free memory; it never changes the result beyond rounding."""
    distributed: Annotated[Literal["ddp", "fsdp2"], RUNTIME] = "ddp"
    """Under torchrun: replicate the model on every rank (ddp), or cut its parameters over the ranks (fsdp2)."""
    gradient_checkpointing: Annotated[Literal["auto", "on", "off"], RUNTIME] = "auto"
    """Compute activations again in backward, at about half as much time again: auto only when a step does not fit."""
    save_steps: Annotated[int, RUNTIME, Field(ge=1)] = 50
    """Optimizer steps between checkpoints."""
    save_total_limit: Annotated[int, RUNTIME, Field(ge=1)] = 2
    """Checkpoints to keep: the newest ones by step, and the best where the best weights are asked for."""
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
        if len({ROWS[name] for name in self.loss_type}) > 1:
            yield f"losses of different kinds of rows do not add up: {', '.join(self.loss_type)}"
        read = {setting for name in self.loss_type for setting in READS[name]}
        for setting in sorted({s for settings in READS.values() for s in settings} - read):
            if getattr(self, setting) != type(self).model_fields[setting].default:
                readers = ", ".join(name for name, settings in READS.items() if setting in settings)
                yield f"{setting} = {getattr(self, setting)} is read by none of {', '.join(self.loss_type)} ({readers})"
        yield from self._model_misfits()
        yield from self._schedule_misfits()
        yield from self._evaluation_misfits()
        if "exo_pair" in self.loss_type and not self.label_smoothing:
            yield "exo_pair needs label_smoothing above 0: its paper uses 1e-3"
        if {"simpo", "alphapo"} & set(self.loss_type):
            yield from self._margin_misfits()

    def _changed(self, *names: str) -> Iterator[str]:
        """Of these settings, those that do not have their default."""
        return (f"{n} = {getattr(self, n)}" for n in names if getattr(self, n) != type(self).model_fields[n].default)

    def _model_misfits(self) -> Iterator[str]:
        if self.reference_model == UNAVAILABLE and self.reference_adapter != "none":
            yield "reference_adapter has no model: reference_model = unavailable loads none"
        if self.tuning == "full":
            for given in self._changed(*LORA_ONLY):
                yield f"{given} is read only with tuning = lora"
            if self.adapter != "none":
                yield "tuning = full trains no adapter: merge it first (--merge), then pass the result as --model"
        if self.distributed == "fsdp2" and (self.load_in_4bit or self.optim not in ("adamw_torch_fused", "rmsprop")):
            yield "bitsandbytes does not work on the sharded parameters of distributed = fsdp2: use ddp"

    def _schedule_misfits(self) -> Iterator[str]:
        ratio = list(self._changed("warmup_ratio")) if self.warmup_ratio else []
        if self.warmup_steps and ratio:
            yield f"warmup_steps = {self.warmup_steps} and {ratio[0]} are two lengths of one warmup: give one of them"
        if self.lr_scheduler_type == "constant" and (self.warmup_steps or ratio):
            yield "lr_scheduler_type = constant has no warmup: choose constant_with_warmup"

    def _evaluation_misfits(self) -> Iterator[str]:
        given_rows = [name for name in ("eval_pairs", "eval_labels", "eval_groups") if getattr(self, name)]
        if given_rows and self.eval_split:
            yield f"{given_rows[0]} and eval_split both say what to evaluate on: give one of them"
        if not (given_rows or self.eval_split):
            for given in self._changed(
                "eval_steps", "load_best_model_at_end", "metric_for_best_model", "early_stopping_patience"
            ):
                yield f"{given} needs something to evaluate on: give eval_split, or eval_{ROWS[self.loss_type[0]]}"
        if self.metric_for_best_model != "eval_loss" and not (
            self.load_best_model_at_end or self.early_stopping_patience
        ):
            yield "metric_for_best_model is read only with load_best_model_at_end or early_stopping_patience"

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
