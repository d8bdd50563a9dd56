"""TRL's DPOTrainer on pairs of prefpipe, with their token ids and reference log-probs as they are.

    prefpipe build-pairs --completions runs/g --reward NAME --format trl --out runs/p
    python examples/trl_dpo.py MODEL runs/p/trl OUT

TRL 1.16 tokenises every dataset again and computes its own reference; the two methods below hand it ours. No
reference model is loaded and no reference pass is made. At the first step the loss is ln 2: they belong together.
"""

import sys

from datasets import Dataset, load_dataset
from trl import DPOConfig, DPOTrainer


class CachedDPOTrainer(DPOTrainer):
    """Takes prompt_ids, chosen_ids, rejected_ids, ref_chosen_logps and ref_rejected_logps from the dataset."""

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *_: object) -> Dataset:
        return dataset


def main(model: str, pairs: str, out: str) -> None:
    """Train for one epoch and print the loss of every step."""
    rows = load_dataset("parquet", data_files=f"{pairs}/*.parquet", split="train", cache_dir=f"{out}/cache")
    config = DPOConfig(
        output_dir=out, precompute_ref_log_probs=True, max_length=None, num_train_epochs=1, logging_steps=1,
        per_device_train_batch_size=4, learning_rate=1e-5, report_to="none", save_strategy="no", use_cpu=True,
        bf16=False,
    )  # fmt: skip
    trainer = CachedDPOTrainer(model=model, args=config, train_dataset=rows)
    trainer.train()
    print("losses", *(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))


if __name__ == "__main__":
    main(*sys.argv[1:])
