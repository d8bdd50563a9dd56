"""Rows as TRL 1.16 reads them: `datasets.load_dataset("parquet")`, then DPOTrainer or KTOTrainer.

TRL ignores columns that it does not know. `*_ids` are the token ids of the reference log-probs. TRL tokenises the texts
again, with the tail of the template after the end-of-sequence token; examples/ shows the few lines that make it take
ids and log-probs from these columns.
"""

from dataclasses import dataclass

import polars as pl
import pyarrow as pa

from prefpipe.errors import DataError
from prefpipe.schemas import Float32, Messages, TokenIds, arrow_schema


@dataclass(frozen=True)
class TrlPair:
    """A conversational preference row."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    prompt_ids: TokenIds
    chosen_ids: TokenIds
    rejected_ids: TokenIds
    ref_chosen_logps: Float32 | None
    ref_rejected_logps: Float32 | None
    reward_gap: float


@dataclass(frozen=True)
class TrlTextPair:
    """A standard preference row: plain text."""

    prompt: str
    chosen: str
    rejected: str
    prompt_ids: TokenIds
    chosen_ids: TokenIds
    rejected_ids: TokenIds
    ref_chosen_logps: Float32 | None
    ref_rejected_logps: Float32 | None
    reward_gap: float


@dataclass(frozen=True)
class TrlLabel:
    """A conversational unpaired row."""

    prompt: Messages
    completion: Messages
    label: bool
    prompt_ids: TokenIds
    completion_ids: TokenIds
    ref_logps: Float32 | None


@dataclass(frozen=True)
class TrlTextLabel:
    """A standard unpaired row: plain text."""

    prompt: str
    completion: str
    label: bool
    prompt_ids: TokenIds
    completion_ids: TokenIds
    ref_logps: Float32 | None


def pairs(rows: pl.DataFrame, form: str) -> tuple[type, pa.Table]:
    """Rows of Pair in TRL's form, conversational (`trl`) or plain text (`trl-standard`)."""
    renamed = rows.with_columns(
        prompt_ids="prompt_token_ids", chosen_ids="chosen_token_ids", rejected_ids="rejected_token_ids"
    )
    if form == "trl":
        return TrlPair, renamed.select(arrow_schema(TrlPair).names).to_arrow()
    return TrlTextPair, _as_text(renamed, ("chosen", "rejected")).select(arrow_schema(TrlTextPair).names).to_arrow()


def labels(rows: pl.DataFrame, form: str) -> tuple[type, pa.Table]:
    """Rows of Label in TRL's form, conversational (`trl`) or plain text (`trl-standard`)."""
    renamed = rows.with_columns(prompt_ids="prompt_token_ids", completion_ids="token_ids")
    if form == "trl":
        return TrlLabel, renamed.select(arrow_schema(TrlLabel).names).to_arrow()
    return TrlTextLabel, _as_text(renamed, ("completion",)).select(arrow_schema(TrlTextLabel).names).to_arrow()


def _as_text(rows: pl.DataFrame, answers: tuple[str, ...]) -> pl.DataFrame:
    turns = pl.col("prompt").list.len()
    one_user = (turns == 1) & (pl.col("prompt").list.first().struct.field("role") == "user")
    other = rows.filter(~one_user)
    if other.height:
        raise DataError(
            f"{other.height} prompts are conversations, not one user message (first: prompt {other['prompt_id'][0]})",
            "plain text cannot hold roles: use --format trl",
        )
    return rows.with_columns(pl.col(n).list.first().struct.field("content").alias(n) for n in ("prompt", *answers))
