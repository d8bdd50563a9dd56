"""Settings of `prefpipe train`, named as in transformers.TrainingArguments and TRL's DPOConfig where they have them."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from prefpipe.config import losses, rewards, shared
from prefpipe.config.base import ADDED, PATH, REMOTE, RUNTIME, Heading
from prefpipe.config.losses import LossName, LossSettings, Objective

Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]
LORA_ONLY = (  # settings that nothing reads when every weight is trained
    "lora_r",
    "lora_alpha",
    "use_rslora",
    "lora_dropout",
    "lora_target_modules",
    "lora_target_parameters",
    "load_in_4bit",
    "merge",
)
NO_PARAMETERS = ("lora_dropout", "load_in_4bit", "distributed")  # settings that peft cannot apply to bare parameters
# Settings that nothing reads when there are no rows to evaluate on.
EVAL_ONLY = ("eval_steps", "load_best_model_at_end", "metric_for_best_model", "early_stopping_patience")
SFT_ONLY = ("sft_weight", "sft_batch_size", "sft_column")  # settings that nothing reads without sft
LEARNING_RATES = {"lora": 1e-5, "full": 1e-6}  # by tuning, where learning_rate is 0
UNAVAILABLE = "unavailable"  # the reference_model of rows whose log-probs cannot be checked here


class TrainConfig(LossSettings):
    """Train a policy on pairs, labels or ranked groups with cached reference log-probs: one model in memory."""

    HEADINGS: ClassVar[tuple[str, ...]] = (
        "Model and rows",
        "Mixing",
        "Reference",
        "Losses",
        "Settings of many losses",
        "Settings of single losses",
        "Optimizer and schedule",
        "Adapter or whole model",
        "Number type, seed and order",
        "Evaluation",
        "Memory and devices",
        "Checkpoints, alerts and trackers",
    )

    model: Annotated[shared.Model, Heading("Model and rows")] = shared.DEFAULT_MODEL
    adapter: shared.Adapter = "none"
    pairs: Annotated[tuple[str, ...], PATH, REMOTE] = ()
    """Run directories of `prefpipe build-pairs`, or files, folders and datasets of the hub (hf:OWNER/NAME) with
    `prompt`, `chosen`, `rejected`."""
    labels: Annotated[
        tuple[str, ...],
        PATH,
        REMOTE,
        Field(
            description=f"For {', '.join(losses.names('labels'))}: run directories with labels, or files, folders and "
            "datasets of the hub with `prompt`, `completion`, `label`."
        ),
    ] = ()
    groups: Annotated[
        tuple[str, ...],
        PATH,
        Field(
            description=f"For {', '.join(losses.names('groups'))}: run directories with ranked groups of completions."
        ),
    ] = ()
    max_length: Annotated[int, ADDED, Field(ge=2)] = 2048
    """Longest prompt and completion together of a row that is read from a file, in tokens; never more than the model's
    context. Rows of runs are held to the context alone."""
    max_prompt_length: Annotated[int, ADDED, Field(ge=1)] = 1024
    """Longest prompt of a row that is read from a file, in tokens; a row with a longer one is dropped."""
    overlong: Annotated[Literal["drop", "keep_start"], ADDED] = "drop"
    """A row of a file over max_length: drop it, or keep the start of its completions."""
    chat_template: shared.ChatTemplate = "model"
    special_tokens_in_prompts: Annotated[rewards.SpecialTokens, ADDED] = "drop"
    chat_template_kwargs: shared.TemplateKwargs = "{}"
    template_changes: shared.TemplateChanges = "drop"
    column: shared.Column = ()

    source_weights: Annotated[tuple[Annotated[float, Field(gt=0)], ...], ADDED, Heading("Mixing")] = ()
    """Weights of the sources in pairs, labels or groups, one for each in their order: an epoch draws exactly their
    shares, rounded to whole rows. Without them every row is drawn once."""
    epoch_length: Annotated[Literal["all_rows", "first_exhausted", "all_exhausted"], ADDED] = "all_rows"
    """With source_weights: an epoch has as many rows as all sources together (all_rows: small sources are repeated,
    large ones cut), ends when the first source is used up (first_exhausted: the others are cut, and the next epoch goes
    on in them), or when the last one is (all_exhausted: the others are repeated)."""
    sft: Annotated[tuple[str, ...], PATH, REMOTE] = ()
    """Answers to imitate beside the preferences: files, folders or datasets of the hub with `prompt`, `completion`, or
    `messages` that end with the assistant. Every step adds sft_weight times their mean NLL of a completion token."""
    sft_weight: Annotated[float, ADDED, Field(gt=0)] = 1.0
    """Weight of the NLL of the rows in sft, beside the losses of the preferences."""
    sft_batch_size: Annotated[int, ADDED, Field(ge=1)] = 8
    """Rows of sft in every optimizer step, beside those of train_batch_size; they come in shuffled passes."""
    sft_column: Annotated[tuple[str, ...], ADDED] = ()
    """As column, for the files of sft."""

    reference_model: Annotated[str, PATH, Heading("Reference")] = "policy"
    """Model that the reference log-probs are of: policy (the one that is trained, with its adapter on or off), another
    one (as in model), which is loaded first to check them, or unavailable: they are used as they are, unchecked."""
    reference_adapter: Annotated[str, PATH] = "none"
    """Directory of the reference's PEFT LoRA adapter on top of reference_model, or 'none'."""
    ref_logps: Annotated[tuple[str, ...], PATH] = ()
    """Runs of `prefpipe score` or `generate` whose reference log-probs take the place of those in the rows."""
    audit_rows: Annotated[int, Field(ge=1)] = 32
    """Rows scored again before step 0 to prove that the cached reference log-probs belong to the reference."""

    loss_type: Annotated[
        tuple[LossName, ...],
        Heading("Losses"),
        Field(
            min_length=1,
            description=f"Losses to add up, under TRL's names where it has them: {', '.join(losses.LOSSES)}, or "
            "functions of yours, module:function; sigmoid is DPO, and docs/losses.md says which to choose.",
        ),
    ] = ("sigmoid",)
    loss_weights: tuple[Annotated[float, Field(ge=0)], ...] = (1.0,)
    """Weight of each loss in loss_type; below 0 a loss would be trained against itself."""

    optim: Annotated[
        Literal["adamw_torch_fused", "rmsprop", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"],
        Heading("Optimizer and schedule"),
    ] = "adamw_torch_fused"
    """Optimizer, on float32 master weights; the 8-bit and the paged ones come from the package bitsandbytes."""
    optimizer_from: Annotated[str, PATH] = "none"
    """Complete run of `prefpipe train` on the same tensors, with its last checkpoint: its moments and step counts are
    taken over, no weights and no schedule. 'none' begins with a new optimizer."""
    learning_rate: Annotated[float, Field(ge=0)] = 0.0
    """Peak learning rate. 0 takes that of tuning: 1e-6 for full (the default of TRL's DPOConfig), 1e-5 for lora, in 4
    bits too (ten times as much, as Schulman et al. 2025 measured: "LoRA Without Regret")."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Decay after warmup: linear or cosine towards zero; constant has no warmup, constant_with_warmup has."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of all steps over which the learning rate rises. The first of w such steps has the rate peak / (w + 1): a
    step at 0 would be lost."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """The same in steps, in place of warmup_ratio; 0 leaves it to warmup_ratio."""
    num_train_epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over the rows."""
    train_batch_size: Annotated[int, Field(ge=1)] = 8
    """Pairs, labels or groups in one optimizer step, whatever the micro-batches."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of AdamW, L2 penalty of rmsprop; norms and biases have none, as in transformers."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this global norm."""

    tuning: Annotated[Literal["lora", "full"], Heading("Adapter or whole model")] = "lora"
    """What is trained: a LoRA adapter on the frozen model, or every weight of the model (OUT/model is a new model)."""
    lora_r: Annotated[int, Field(ge=1)] = 16
    """Rank of a new LoRA adapter; an adapter that is trained further keeps its rank, scale and targets."""
    lora_alpha: Annotated[int, Field(ge=1)] = 32
    """LoRA scale is lora_alpha / lora_r."""
    use_rslora: bool = False
    """Scale lora_alpha / sqrt(lora_r) instead (rank-stabilised LoRA, arXiv:2312.03732)."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout in front of the adapter while it trains; the model's own dropout is always off."""
    lora_target_modules: str = "all-linear"
    """Adapted modules: all-linear (without the head), or names joined by commas."""
    lora_target_parameters: Annotated[str, ADDED] = ""
    """Adapted parameters that belong to no linear module: all-experts for the matrices of all stacked experts, or names
    or their ends such as mlp.experts.gate_up_proj, joined by commas; empty for none (target_parameters of peft)."""
    router_aux_loss_coef: Annotated[float, ADDED, Field(ge=0)] = 0.0
    """For mixtures of experts: weight of the model's load-balancing loss (arXiv:2101.03961), a mean over
    completions that is added to the loss; rows of sft add none; 0 leaves it out."""
    load_in_4bit: bool = False
    """QLoRA: the frozen weights in 4 bits (nf4, double quantization) through the package bitsandbytes."""
    merge: bool = False
    """Write OUT/merged too: the model with the trained adapter in its weights, for tools that take no adapters."""

    dtype: Annotated[rewards.Dtype, Heading("Number type, seed and order")] = "auto"
    seed: shared.Seed = 0
    train_order: Annotated[Literal["shuffled", "given", "hardness"], ADDED] = "shuffled"
    """Order of the rows: shuffled anew in every epoch (labels keep the proportion of their classes in every step), as
    they are given, or pairs from the largest reward_gap to the smallest (hardness: from easy to hard)."""
    group_by_prompt: bool = False
    """Draw the pairs or groups of a prompt into the same step: a forward is shared, gradients are correlated."""

    eval_pairs: Annotated[tuple[str, ...], PATH, REMOTE, Heading("Evaluation")] = ()
    """Pairs to evaluate on, as in pairs; eval_split takes rows from the training rows instead."""
    eval_labels: Annotated[tuple[str, ...], PATH, REMOTE] = ()
    """Labels to evaluate on, as in labels; KTO's reference point is then computed from mismatched rows of these."""
    eval_groups: Annotated[tuple[str, ...], PATH] = ()
    """Ranked groups to evaluate on, as in groups."""
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

    max_tokens_per_micro_batch: Annotated[int, RUNTIME, Field(ge=0), Heading("Memory and devices")] = 0
    """Token budget of one forward pass, 0 to fit the free memory; it never changes the result beyond rounding."""
    distributed: Annotated[Literal["ddp", "fsdp2"], RUNTIME] = "ddp"
    """Under torchrun: replicate the model on every rank (ddp), or cut its parameters over the ranks (fsdp2)."""
    gradient_checkpointing: Annotated[Literal["auto", "on", "off"], RUNTIME] = "auto"
    """Compute activations again in backward, at about half as much time again: auto only when a step does not fit."""

    save_steps: Annotated[int, RUNTIME, Field(ge=1), Heading("Checkpoints, alerts and trackers")] = 50
    """Optimizer steps between checkpoints."""
    save_total_limit: Annotated[int, RUNTIME, Field(ge=1)] = 2
    """Checkpoints to keep: the newest ones by step, and the best where the best weights are asked for."""
    strict: Annotated[bool, RUNTIME] = False
    """End the run with exit code 3 when a STOP rule of docs/diagnostics.md fires; the last checkpoint stays."""
    report_to: Annotated[tuple[Tracker, ...], RUNTIME] = ()
    """Trackers that get the metrics beside metrics.jsonl; local and offline unless their own settings say otherwise."""
    report: Annotated[bool, ADDED, RUNTIME] = False
    """Write OUT/report.html at every evaluation and at the end, so that the run can be watched."""

    @property
    def objective(self) -> Objective:
        """The losses, their weights and their settings."""
        values = {name: getattr(self, name) for name in LossSettings.model_fields}
        rows = "labels" if self.labels else "groups" if self.groups else "pairs"
        return Objective(self.loss_type, self.loss_weights, LossSettings.model_construct(**values), rows)

    @property
    def resolved(self) -> "TrainConfig":
        """The same settings with the learning rate as a number: what a run trains with, saves and is identified by."""
        return self.model_copy(update={"learning_rate": self.learning_rate or LEARNING_RATES[self.tuning]})

    @field_validator("loss_type", mode="before")
    @classmethod
    def _losses_by_our_names(cls, value: Any) -> Any:
        for name in value if isinstance(value, list | tuple) else ():
            if name in losses.OTHER_NAMES:
                raise ValueError(f"'{name}' is here {losses.OTHER_NAMES[name]}")
        return value

    @model_validator(mode="after")
    def _settings_fit(self) -> "TrainConfig":
        problems = [
            *losses.misfits(self.objective),
            *self._model_misfits(),
            *self._schedule_misfits(),
            *self._order_misfits(),
            *self._mixture_misfits(),
            *self._evaluation_misfits(),
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _changed(self, *names: str) -> Iterator[str]:
        """Of these settings, those that do not have their default, as `name = value`."""
        return (f"{n} = {getattr(self, n)}" for n in names if getattr(self, n) != type(self).model_fields[n].default)

    def _model_misfits(self) -> Iterator[str]:
        if self.reference_model == UNAVAILABLE and self.reference_adapter != "none":
            yield "reference_adapter has no model: reference_model = unavailable loads none"
        if self.tuning == "full":
            for setting in self._changed(*LORA_ONLY):
                yield f"{setting} is read only with tuning = lora"
            if self.adapter != "none":
                yield "tuning = full trains no adapter: merge it first (--merge), then pass the result as --model"
        if self.lora_target_parameters:
            yield from (f"{s} does not work with lora_target_parameters" for s in self._changed(*NO_PARAMETERS))
        if self.distributed == "fsdp2" and (self.load_in_4bit or self.optim not in ("adamw_torch_fused", "rmsprop")):
            yield "bitsandbytes does not work on the sharded parameters of distributed = fsdp2: use ddp"

    def _schedule_misfits(self) -> Iterator[str]:
        ratio = list(self._changed("warmup_ratio")) if self.warmup_ratio else []
        if self.warmup_steps and ratio:
            yield f"warmup_steps = {self.warmup_steps} and {ratio[0]} are two lengths of one warmup: give one of them"
        if self.lr_scheduler_type == "constant" and (self.warmup_steps or ratio):
            yield "lr_scheduler_type = constant has no warmup: choose constant_with_warmup"

    def _order_misfits(self) -> Iterator[str]:
        if self.train_order == "hardness" and self.objective.kind != "pairs":
            yield f"train_order = hardness orders pairs by reward_gap: loss {self.loss_type[0]} trains on others"

    def _mixture_misfits(self) -> Iterator[str]:
        kind, weights = self.objective.kind, len(self.source_weights)
        if weights and weights != len(getattr(self, kind)):
            yield f"{len(getattr(self, kind))} {kind} but {weights} source_weights: give one for each"
        if weights and self.train_order == "given":
            yield "train_order = given takes every row once, and source_weights draws rows: leave one of them out"
        yield from (f"{s} is read only with source_weights" for s in self._changed("epoch_length") if not weights)
        yield from (f"{s} is read only with sft" for s in self._changed(*SFT_ONLY) if not self.sft)
        if not (any(self.loss_weights) or self.sft):
            yield "every one of loss_weights is 0, and there is no sft: nothing would be trained"

    def _evaluation_misfits(self) -> Iterator[str]:
        rows = [name for name in ("eval_pairs", "eval_labels", "eval_groups") if getattr(self, name)]
        if rows and self.eval_split:
            yield f"{rows[0]} and eval_split both say what to evaluate on: give one of them"
        if not (rows or self.eval_split):
            for setting in self._changed(*EVAL_ONLY):
                yield f"{setting} needs something to evaluate on: give eval_split, or eval_{self.objective.kind}"
        if self.metric_for_best_model != "eval_loss" and not (
            self.load_best_model_at_end or self.early_stopping_patience
        ):
            yield "metric_for_best_model is read only with load_best_model_at_end or early_stopping_patience"
