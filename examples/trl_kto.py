"""TRL's KTOTrainer on labels of prefpipe, with their token ids and reference log-probs as they are.

    prefpipe build-pairs --completions runs/g --reward NAME --output labels --format trl --out runs/l
    python examples/trl_kto.py MODEL runs/l/trl OUT

This holds for `apo_zero_unpaired`, which needs no KL estimate. For the loss `kto` TRL pairs each prompt with its
neighbour's completion in the batch; use KTOTrainer itself on the same files, it computes the reference of both.
"""

import sys

from datasets import Dataset, load_dataset
from trl import KTOConfig, KTOTrainer


class CachedKTOTrainer(KTOTrainer):
    """Takes prompt_ids, completion_ids, label and ref_logps from the dataset."""

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *_: object) -> Dataset:
        return dataset


def main(model: str, labels: str, out: str) -> None:
    """Train for one epoch and print the loss of every step."""
    rows = load_dataset("parquet", data_files=f"{labels}/*.parquet", split="train", cache_dir=f"{out}/cache")
    config = KTOConfig(
        output_dir=out, loss_type="apo_zero_unpaired", precompute_ref_log_probs=True, max_length=None,
        num_train_epochs=1, logging_steps=1, per_device_train_batch_size=4, learning_rate=1e-5, report_to="none",
        save_strategy="no",
        use_cpu=True, bf16=False,
    )  # fmt: skip
    trainer = CachedKTOTrainer(model=model, args=config, train_dataset=rows)
    trainer.train()
    print("losses", *(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))


if __name__ == "__main__":
    main(*sys.argv[1:])
