"""Written by `make fix` from the settings of the commands: do not edit."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from prefpipe.api.run import Run as Run
from prefpipe.errors import PrefpipeError as PrefpipeError

__version__: str
Place = str | os.PathLike[str]
Function = str | Callable[..., Any]

class EngineSettings(TypedDict, total=False):
    model: Place
    adapter: Place
    reward_settings: Mapping[str, Any] | str
    reward_on: Literal["answer", "all"]
    chat_template: Place
    template_date: str
    chat_template_kwargs: str
    template_changes: Literal["drop", "allow"]
    thinking_marks: str
    special_tokens_in_prompts: Literal["drop", "escape", "allow"]
    engine: Literal["vllm", "transformers", "server", "fake"]
    base_urls: str | Sequence[str]
    api_key_env: str
    timeout_seconds: float
    dtype: Literal["auto", "bfloat16", "float16", "float32"]
    seed: int
    workers: Literal["auto"] | int
    cluster: str
    max_num_seqs: int
    tensor_parallel_size: int
    gpu_memory_utilization: float
    kv_cache_mib: int

class SamplingSettings(EngineSettings, total=False):
    prompts: Place
    split: str
    limit: int
    column: str | Sequence[str]
    num_samples: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    stop_token_ids: int | Sequence[int]
    stop: str | Sequence[str]
    max_tokens: int
    max_prompt_tokens: int
    part: str
    shard_rows: int

class GenerateSettings(SamplingSettings, total=False):
    reference: Literal["policy", "base", "none"]
    check: int
    rewards: Function | Sequence[Function]

class ScoreSettings(EngineSettings, total=False):
    inputs: Place | Sequence[Place]
    share: float
    column: str | Sequence[str]
    reference: Literal["policy", "none"]
    check: int
    rewards: Function | Sequence[Function]
    max_length: int
    max_prompt_length: int
    overlong: Literal["drop", "keep_start"]
    part: str
    shard_rows: int
    max_tokens_per_batch: int

class BuildPairsSettings(TypedDict, total=False):
    completions: Place | Sequence[Place]
    reward_runs: Place | Sequence[Place]
    ref_logps: Place | Sequence[Place]
    policy_logps: Place | Sequence[Place]
    reward: Function
    reward_scale: Literal["raw", "prompt", "run"]
    length_penalty: float
    output: Literal["pairs", "labels", "groups"]
    format: Literal["prefpipe", "trl", "trl-standard"]
    seed: int
    rule: Function
    pairs_per_prompt: int
    rule_gap: float
    top_k: int
    correct_reward: float
    weight_by: Literal["rule", "prompt", "pair"]
    preference_prob: Literal["none", "bradley-terry"]
    preference_scale: float
    gap_filter: Literal["both", "absolute", "scaled", "none"]
    min_gap: float
    min_gap_sd: float
    min_chosen_quantile: float
    truncated_chosen: Literal["drop", "keep"]
    truncated_rejected: Literal["drop", "keep"]
    max_length_difference: int
    max_length_ratio: float
    near_identical_tokens: int
    near_identical_share: float
    contradictions: Literal["drop", "keep"]
    subset: Literal["all", "small-implicit-gap", "large-dual-margin", "clear-reference"]
    subset_share: float
    special_tokens: Literal["drop", "keep"]
    refusals: Literal["drop", "keep"]
    max_repetition: float
    languages: str | Sequence[str]
    min_tokens: int
    max_tokens: int
    duplicate_prompts: Literal["drop", "keep"]
    near_duplicate_prompts: float
    contamination: Place | Sequence[Place]
    contamination_ngram: int
    label_rule: Literal["mean", "median", "threshold", "quantile", "thumbs", "pairs"]
    label_threshold: float
    label_quantile: float
    kl_bank_rows: int
    beta: float
    workers: int
    cluster: str
    strict: bool

class LossSettings(TypedDict, total=False):
    beta: float
    label_smoothing: float
    use_weighting: bool
    ld_alpha: float
    ipo_reduction: Literal["sum", "mean"]
    simpo_gamma: float
    simpo_gamma_beta_ratio: float
    alphapo_alpha: float
    cal_dpo_weight: float
    dpop_lambda: float
    rdpo_alpha: float
    margin_alpha: float
    rainbow_mix: float
    rainbow_margin: float
    nll_scope: Literal["response", "prompt_response"]
    desirable_weight: float
    undesirable_weight: float
    kl_bank_size: int
    kl_rows: int

class TrainSettings(LossSettings, total=False):
    model: Place
    adapter: Place
    pairs: Place | Sequence[Place]
    labels: Place | Sequence[Place]
    groups: Place | Sequence[Place]
    max_length: int
    max_prompt_length: int
    overlong: Literal["drop", "keep_start"]
    chat_template: Place
    special_tokens_in_prompts: Literal["drop", "escape", "allow"]
    chat_template_kwargs: str
    template_changes: Literal["drop", "allow"]
    column: str | Sequence[str]
    source_weights: float | Sequence[float]
    epoch_length: Literal["all_rows", "first_exhausted", "all_exhausted"]
    sft: Place | Sequence[Place]
    sft_weight: float
    sft_batch_size: int
    sft_column: str | Sequence[str]
    reference_model: Place
    reference_adapter: Place
    ref_logps: Place | Sequence[Place]
    audit_rows: int
    loss_type: Function | Sequence[Function]
    loss_weights: float | Sequence[float]
    optim: Literal["adamw_torch_fused", "rmsprop", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
    optimizer_from: Place
    learning_rate: float
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"]
    warmup_ratio: float
    warmup_steps: int
    num_train_epochs: int
    train_batch_size: int
    weight_decay: float
    max_grad_norm: float
    tuning: Literal["lora", "full"]
    lora_r: int
    lora_alpha: int
    use_rslora: bool
    lora_dropout: float
    lora_target_modules: str
    lora_target_parameters: str
    router_aux_loss_coef: float
    load_in_4bit: bool
    merge: bool
    dtype: Literal["auto", "bfloat16", "float16", "float32"]
    seed: int
    train_order: Literal["shuffled", "given", "hardness"]
    group_by_prompt: bool
    eval_pairs: Place | Sequence[Place]
    eval_labels: Place | Sequence[Place]
    eval_groups: Place | Sequence[Place]
    eval_split: float
    eval_steps: int
    load_best_model_at_end: bool
    metric_for_best_model: Literal["eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"]
    early_stopping_patience: int
    max_tokens_per_micro_batch: int
    distributed: Literal["ddp", "fsdp2"]
    gradient_checkpointing: Literal["auto", "on", "off"]
    save_steps: int
    save_total_limit: int
    strict: bool
    report_to: (
        Literal["tensorboard", "wandb", "trackio", "mlflow"]
        | Sequence[Literal["tensorboard", "wandb", "trackio", "mlflow"]]
    )
    report: bool

class EvaluateSettings(SamplingSettings, total=False):
    round: int
    reward: Function | Sequence[Function]
    pass_reward: float
    baseline: Place | Sequence[Place]
    judge: str
    judge_on: Literal["greedy", "sampled", "all"]
    kl_to: str | Sequence[str]
    guard: str | Sequence[str]
    guard_pass_reward: float | Sequence[float]
    guard_split: str
    perplexity_text: Place
    trained_on: Place | Sequence[Place]

class StopSettings(TypedDict, total=False):
    rules: (
        Literal["gain", "mixed", "kl", "length", "degenerate", "guard"]
        | Sequence[Literal["gain", "mixed", "kl", "length", "degenerate", "guard"]]
    )
    gain_errors: float
    gain_rounds: int
    mixed_share: float
    mixed_rounds: int
    kl_cap: float
    kl_rounds: int
    length_growth: float
    length_loss: float
    length_rounds: int
    degenerate_rise: float
    degenerate_rounds: int
    guard_rounds: int

class IterateSettings(TypedDict, total=False):
    model: Place
    rounds: int
    reference: str
    start: Literal["previous", "base"]
    optimizer: Literal["fresh", "continue"]
    replay: float
    replay_rounds: int
    prompts_per_round: int
    repeat_prompts: bool
    learning_rates: float | Sequence[float]
    betas: float | Sequence[float]
    temperatures: float | Sequence[float]
    metric_for_best_round: Literal["greedy.pass", "sampled.pass", "greedy.mean_reward", "sampled.mean_reward"]
    evaluate_every: int
    from_run: Place
    from_round: int
    launcher: str
    keep_engine: Literal["auto", "always", "never"]
    stop: StopSettings
    report: bool
    generate: GenerateSettings
    build_pairs: BuildPairsSettings
    train: TrainSettings
    evaluate: EvaluateSettings

class SweepSettings(TrainSettings, total=False):
    grid: str | Sequence[str]
    samples: int
    halving: float | Sequence[float]
    metric_for_best_variant: Literal["accuracy", "margin", "win_rate"]
    evaluate: str
    workers: Literal["auto"] | int

class PlanSettings(TrainSettings, total=False):
    gpus: int
    gpu_memory: float

def generate(
    recipe: Place | None = None, *, out: Place, force: bool = False, **settings: Unpack[GenerateSettings]
) -> Run:
    """Sample completions for prompts, with reference log-probs and rewards beside them. `help(prefpipe.generate)`
    explains every setting."""

def score(recipe: Place | None = None, *, out: Place, force: bool = False, **settings: Unpack[ScoreSettings]) -> Run:
    """Add reference log-probs or rewards to completions, pairs or labels that exist already, ours or foreign.
    `help(prefpipe.score)` explains every setting."""

def build_pairs(
    recipe: Place | None = None, *, out: Place, force: bool = False, **settings: Unpack[BuildPairsSettings]
) -> Run:
    """Turn completions with rewards into pairs, labels (KTO) or ranked groups; every dropped row has its reason.
    `help(prefpipe.build_pairs)` explains every setting."""

def train(recipe: Place | None = None, *, out: Place, force: bool = False, **settings: Unpack[TrainSettings]) -> Run:
    """Train a policy on pairs, labels or ranked groups with cached reference log-probs: one model in memory.
    `help(prefpipe.train)` explains every setting."""

def evaluate(
    recipe: Place | None = None, *, out: Place, force: bool = False, **settings: Unpack[EvaluateSettings]
) -> Run:
    """Rate a policy on held-out prompts, with intervals, and compare it with earlier evaluations.
    `help(prefpipe.evaluate)` explains every setting."""

def iterate(
    recipe: Place | None = None, *, out: Place, force: bool = False, **settings: Unpack[IterateSettings]
) -> Run:
    """Rounds of generate, build-pairs, train and evaluate, until the last one or until a rule says stop.
    `help(prefpipe.iterate)` explains every setting."""

def sweep(recipe: Place | None = None, *, out: Place, force: bool = False, **settings: Unpack[SweepSettings]) -> Run:
    """Train variants of one recipe on the same rows, with one reference and one base model, and compare them.
    `help(prefpipe.sweep)` explains every setting."""

def load(directory: Place) -> Run:
    """The run in a directory, complete or not. Raises MissingInputError where there is no such directory, DataError
    where it holds no run of prefpipe."""

def gather(*runs: Place, out: Place, force: bool = False) -> Run:
    """Join the runs of all parts (`part="I/N"`) of generate, score or evaluate into the run that one command makes.

    Returns the run in `out`. Raises UsageError for runs that are not all parts of one command, MissingInputError for
    one that is not complete, DataError for a damaged one.
    """

def report(run: Place, out: Place | None = None) -> Path:
    """Write one HTML page about a run, or about all rounds of iterate, finished or not, to `out`, by default
    report.html in it. Returns its path. Raises MissingInputError and DataError as `load` does."""

def merge(run: Place, out: Place, model: str = "") -> Path:
    """Merge the adapter of a run of train, or of the best round of iterate, into the weights of its base.

    `model` is the base, if it is not where it was. Returns `out`, which holds the merged model. Raises UsageError for a
    run without an adapter and for an `out` that holds something else, IdentityError for another base, DataError for a
    damaged adapter.
    """

def plan(recipe: Place | None = None, **settings: Unpack[PlanSettings]) -> str:
    """What a run of train with these settings will cost, as text: memory by part (GiB), tokens, steps, time (minutes),
    by a probe of one step; or, with `gpus`, the memory of a rank for so many of them (each of `gpu_memory` GiB), from
    config.json. It writes nothing. All other settings and errors are those of train."""
