"""TRL's DPOTrainer on the small model beside our step, with its defaults and with its best settings."""

import importlib.util
import tempfile
import time
from statistics import median
from typing import Any

import torch

from card import measure
from card.record import Fact, Figure
from card.sizes import Bench, Case, build, rows
from card.steps import BETA, tree_seconds
from card.worker import Found, NotAtHand

STEPS = 3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GOALS = {"its defaults": 3.0, "its best settings": 1.5}


def trl(bench: Bench) -> Found:
    """Pairs a second of a step of TRL and of ours, on as many tokens. Its defaults are float32 weights under autocast,
    gradient checkpointing and a reference pass in every step; its best settings are weights in 16 bits, none of the
    two others, and the largest batch that fits. It gets texts, one word for every token."""
    if importlib.util.find_spec("trl") is None or importlib.util.find_spec("datasets") is None:
        raise NotAtHand("trl and datasets are not installed: its speed is not measured")
    sizes = bench.sizes
    for case in sizes.cases[:2]:
        pairs = rows(case, sizes.small.vocab_size)
        ours = tree_seconds(bench.lora(sizes.small), pairs, sizes.tokens)
        yield Figure(f"{case.name}: prefpipe", len(pairs) / ours, "pairs/s")
        bench.drop()
        for name, goal in GOALS.items():
            taken, peak, batch = _largest_batch(bench, case, len(pairs), best=name == "its best settings")
            yield Fact(f"TRL with {name}, {case.name}", f"{batch} pairs in a pass")
            yield Figure(f"{case.name}: TRL with {name}", len(pairs) / taken, "pairs/s")
            yield Figure(f"{case.name}: TRL with {name}, peak", peak / 2**30, "GiB")
            yield Figure(f"{case.name}: speed over TRL with {name}", taken / ours, "x", goal)


def _largest_batch(bench: Bench, case: Case, pairs: int, *, best: bool) -> tuple[float, float, int]:
    """Seconds of a step, bytes at its highest point and pairs in a pass, of the largest pass that fits."""
    batch = pairs
    while True:
        try:
            return *_train(bench, case, pairs, batch, best=best), batch
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2
        bench.release()


def _train(bench: Bench, case: Case, pairs: int, batch: int, *, best: bool) -> tuple[float, float]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    sizes, times = bench.sizes, []
    on_card = sizes.device.type == "cuda"

    class Clock(TrainerCallback):
        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            measure.synchronize(sizes.device)
            times.append(-time.perf_counter())

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            measure.synchronize(sizes.device)
            times[-1] += time.perf_counter()

    tuned = {"gradient_checkpointing": False, "precompute_ref_log_probs": True} if best else {}
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder, beta=BETA, max_length=case.prompt + case.completion + 1, max_steps=STEPS,
            per_device_train_batch_size=batch, gradient_accumulation_steps=pairs // batch, use_cpu=not on_card,
            bf16=on_card, save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=STEPS, **tuned,
        )  # fmt: skip
        trainer = DPOTrainer(
            model=build(sizes.small, sizes, sizes.dtype if best else torch.float32),
            args=settings,
            train_dataset=Dataset.from_list(_texts(case, sizes.small.vocab_size)),
            processing_class=_tokenizer(sizes.small.vocab_size),
            peft_config=LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM", target_modules=TARGETS),
        )
        trainer.add_callback(Clock())
        peak = measure.peak(trainer.train, sizes.device)
    return median(times[1:]), peak


def _texts(case: Case, vocabulary: int) -> list[dict[str, str]]:
    """The rows of a case as texts; TRL puts a token behind each completion, so that one less is written."""

    def words(ids: tuple[int, ...]) -> str:
        return " ".join(f"w{number}" for number in ids)

    return [
        {"prompt": words(p.prompt_ids), "chosen": f" {words(p.chosen[:-1])}", "rejected": f" {words(p.rejected[:-1])}"}
        for p in rows(case, vocabulary)
    ]


def _tokenizer(vocabulary: int) -> Any:
    """A word for every token id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>")
