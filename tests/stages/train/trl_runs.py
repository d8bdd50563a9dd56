"""Run as a process of its own by test_trl_trainer: TRL's DPOTrainer with several losses on one tiny model.

Writes the token ids it made, its initial adapter (the same for all), and the loss of every step.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

STEPS, BATCH, RATE = 20, 2, 1e-3
RUNS: dict[str, dict[str, Any]] = {
    "sigmoid": {"beta": 0.1},
    "ipo": {"beta": 0.5},
    "sigmoid_norm": {"beta": 5.0},
    "hinge": {"beta": 0.1},
    "robust": {"beta": 0.1, "label_smoothing": 0.1},
    "sigmoid weighted": {"beta": 0.1, "use_weighting": True},
}


def main(model: str, folder: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    for name, values in RUNS.items():
        loss, place = name.split()[0], name.replace(" ", "-")
        settings = DPOConfig(
            output_dir=str(folder / place), use_cpu=True, bf16=False, model_init_kwargs={"dtype": "float32"},
            loss_type=[loss], max_length=None, precompute_ref_log_probs=True, per_device_train_batch_size=BATCH,
            max_steps=STEPS, learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
            max_grad_norm=1.0, optim="adamw_torch", gradient_checkpointing=False, logging_steps=1, save_strategy="no",
            report_to="none", seed=1, disable_tqdm=True, dataloader_pin_memory=False,
            train_sampling_strategy="sequential", **values,
        )  # fmt: skip
        lora = LoraConfig(
            r=4, lora_alpha=8, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        )  # fmt: skip
        torch.manual_seed(0)
        trainer = DPOTrainer(
            model=model, args=settings, train_dataset=load_dataset("json", data_files=str(folder / "pairs.jsonl"),
            split="train"), processing_class=AutoTokenizer.from_pretrained(model), peft_config=lora,
        )  # fmt: skip
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        rows = [[list(row[c]) for c in columns] for row in trainer.train_dataset]
        trainer.model.save_pretrained(str(folder / f"adapter-{place}"))
        trainer.train()
        found[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (folder / "ids.json").write_text(json.dumps(rows))
    (folder / "losses.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
