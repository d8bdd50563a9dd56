"""Pairs that no check of the data report objects to, in the columns that the checks read."""

import random
from typing import Any

import polars as pl

NUM = 6000


def facts(count: int = NUM, **columns: Any) -> pl.DataFrame:
    """Pairs that a careful person likes: unique prompts, equal lengths, mixed hardness."""
    source = random.Random(0)
    lengths = [source.randint(20, 60) for _ in range(2 * count)]
    values: dict[str, Any] = {
        "prompt_id": [f"p{n}" for n in range(count)],
        "chosen_reward": [1 + source.random() for _ in range(count)],
        "rejected_reward": [source.random() for _ in range(count)],
        "chosen_tokens": lengths[:count],
        "rejected_tokens": lengths[count:],
        "chosen_finish_reason": "stop",
        "rejected_finish_reason": "stop",
        "ref_chosen_logps": [-source.uniform(0.5, 1.5) * t for t in lengths[:count]],
        "ref_rejected_logps": [-source.uniform(0.5, 1.5) * t for t in lengths[count:]],
        "chosen_policy": "w",
        "rejected_policy": "w",
    }
    frame = pl.DataFrame({**values, **columns})
    return frame.with_columns(reward_gap=pl.col("chosen_reward") - pl.col("rejected_reward"))


def sample(count: int = 60, **columns: Any) -> pl.DataFrame:
    source = random.Random(1)

    def ids() -> list[int]:
        return [source.randint(10, 5000) for _ in range(20)] + [2]

    def text() -> str:
        return " ".join(source.choices(["tide", "moss", "harp", "owl", "rain", "salt"], k=12)) + "."

    values: dict[str, Any] = {
        "pair_id": [f"{n:032x}" for n in range(count)],
        "prompt_id": [f"p{n}" for n in range(count)],
        "prompt_token_ids": [[1, 100 + n, 7, 8, 9] for n in range(count)],
        "prompt": [f"user: tell me number {n} of many" for n in range(count)],
        "chosen_text": [text() for _ in range(count)],
        "rejected_text": [text() for _ in range(count)],
        "chosen_ids": [ids() for _ in range(count)],
        "rejected_ids": [ids() for _ in range(count)],
    }
    return pl.DataFrame({**values, **columns})
