"""What TRL, vLLM and other trainers call our settings, and the nearest settings to a name that is none."""

import difflib
from collections.abc import Iterable, Sequence

_STEP = "train_batch_size counts the whole step on all devices; micro-batches fit themselves to the memory"
_LENGTH = "max_length holds for prompt and completion together"
_DATA = ("pairs", "inputs", "prompts")
# name of others -> ours, in the order in which a command may have them
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "adapter_name_or_path": ("adapter",),
    "api_base": ("base_urls",),
    "base_model": ("model",),
    "base_url": ("base_urls",),
    "batch_size": ("train_batch_size", "max_num_seqs"),
    "bf16": ("dtype",),
    "checkpoint": ("adapter",),
    "clip_grad": ("max_grad_norm",),
    "cpo_alpha": ("loss_weights",),
    "data": _DATA,
    "data_parallel_size": ("workers",),
    "dataset": _DATA,
    "dataset_name": _DATA,
    "dataset_path": _DATA,
    "dataset_train_split": ("split", "pairs"),
    "deepspeed": ("distributed",),
    "epochs": ("num_train_epochs",),
    "eval_dataset": ("eval_pairs",),
    "evaluation_strategy": ("eval_steps",),
    "eval_strategy": ("eval_steps",),
    "fp16": ("dtype",),
    "fsdp": ("distributed",),
    "gradient_accumulation_steps": ("train_batch_size",),
    "gradient_clipping": ("max_grad_norm",),
    "load_in_8bit": ("load_in_4bit",),
    "lora": ("tuning", "adapter"),
    "lora_modules": ("adapter",),
    "lora_rank": ("lora_r",),
    "loss": ("loss_type",),
    "lr": ("learning_rate",),
    "lr_scheduler": ("lr_scheduler_type",),
    "max_completion_length": ("max_tokens", "max_length"),
    "max_completion_tokens": ("max_tokens", "max_length"),
    "max_model_len": ("max_prompt_tokens", "max_length"),
    "max_new_tokens": ("max_tokens", "max_length"),
    "max_seq_length": ("max_length",),
    "max_steps": ("num_train_epochs", "limit"),
    "model_id": ("model",),
    "model_name": ("model",),
    "model_name_or_path": ("model",),
    "n": ("num_samples",),
    "num_epochs": ("num_train_epochs",),
    "num_generations": ("num_samples",),
    "num_return_sequences": ("num_samples",),
    "optimizer": ("optim",),
    "output_dir": ("out",),
    "overwrite_output_dir": ("force",),
    "peft_model": ("adapter",),
    "per_device_eval_batch_size": ("max_tokens_per_micro_batch",),
    "per_device_train_batch_size": ("train_batch_size",),
    "ref_model": ("reference_model", "reference"),
    "reference_free": ("loss_type",),
    "resume_from_checkpoint": ("out",),
    "reward_funcs": ("rewards", "reward"),
    "reward_model": ("rewards", "reward"),
    "rpo_alpha": ("loss_weights",),
    "target_modules": ("lora_target_modules",),
    "torch_dtype": ("dtype",),
    "tp": ("tensor_parallel_size",),
    "train_file": _DATA,
    "truncation_mode": ("overlong",),
    "use_peft": ("tuning",),
    "wandb": ("report_to",),
    "warmup": ("warmup_ratio",),
}
_NOTES = {  # where ours is not the same under another name
    "cpo_alpha": "add the loss nll, with its weight",
    "gradient_accumulation_steps": _STEP,
    "max_model_len": _LENGTH,
    "max_steps": "training ends after whole passes over the rows",
    "per_device_train_batch_size": _STEP,
    "reference_free": "simpo, cpo and orpo have no reference",
    "resume_from_checkpoint": "the same command with the same --out resumes the run",
    "rpo_alpha": "add the loss nll, with its weight",
}
_NEEDLESS = {  # what others must be told
    "attn_implementation": "the attention follows from the model and the hardware",
    "logging_steps": "every step is a line of metrics.jsonl",
    "packing": "rows have no padding anyhow",
    "padding_free": "rows have no padding anyhow",
    "precompute_ref_log_probs": "reference log-probs are always computed once and kept",
    "push_to_hub": "`prefpipe push` sends a run to the hub",
    "save_strategy": "save_steps says how often",
    "tokenizer": "the tokenizer is that of the model",
    "trust_remote_code": "models with code of their own are refused",
    "use_liger_kernel": "logits are computed in chunks anyhow",
    "use_vllm": "engine says what samples",
}


def meant(word: str, names: Iterable[str]) -> list[str]:
    """The settings among `names` that somebody who writes `word` may mean, the likeliest first; at most three.

    A name in a table (`train.beta`) is found by its last part, too.
    """
    wanted, every = word.replace("-", "_"), list(names)
    for name in (wanted, *OTHER_NAMES.get(_plain(wanted), ()), _plain(wanted)):
        if found := [n for n in every if n == name] or [n for n in every if n.rpartition(".")[2] == name]:
            return found[:3]
    leaves = sorted({name.rpartition(".")[2] for name in every})
    longer = [leaf for leaf in leaves if len(wanted) > 1 and leaf.startswith(f"{_plain(wanted)}_")]
    near = longer or difflib.get_close_matches(wanted, [name for name in every if "." not in name], n=1, cutoff=0.8)
    near = near or difflib.get_close_matches(_plain(wanted), leaves, n=1, cutoff=0.6)
    return [name for name in every if name.rpartition(".")[2] in near][:3]


def said(word: str, names: Iterable[str]) -> str:
    """` (did you mean 'x'?)` with a note where one helps, or nothing."""
    found = meant(word, names)
    nearest = f"did you mean {' or '.join(map(repr, found))}?" if found else ""
    text = f"{nearest} {note(word, found)}".strip()
    return f" ({text})" if text else ""


def note(word: str, names: Sequence[str]) -> str:
    """What else to know about a name of others, where it is not only another name; for one that is none of `names`."""
    plain = _plain(word.replace("-", "_"))
    return _NOTES.get(plain, "") if names else _NEEDLESS.get(plain, "")


def _plain(name: str) -> str:
    return name.rpartition(".")[2].removeprefix("no_")
