"""Rows as TRL 1.16 reads them: `datasets.load_dataset("parquet")`, then DPOTrainer or KTOTrainer.

Messages are structs of role and content. In a run with tool calls, reasoning or tools they are JSON with all their
keys, which `datasets` gives back as they were; `tools` is text, as TRL takes it.

TRL ignores columns that it does not know. `*_ids` are the token ids of the reference log-probs. TRL tokenises the texts
again, with the tail of the template after the end-of-sequence token; examples/ shows the few lines that make it take
ids and log-probs from these columns.
"""

import json
from collections.abc import Mapping
from dataclasses import make_dataclass
from typing import Annotated, Any

import polars as pl
import pyarrow as pa

from prefpipe.errors import DataError
from prefpipe.inputs.messages import to_json
from prefpipe.models.turns import as_dict
from prefpipe.schemas import PLAIN_MESSAGE, Completion, Float32, Message, Prompt, TokenIds, arrow_schema
from prefpipe.stages.build_pairs.candidates import Sources
from prefpipe.stages.build_pairs.partitions import scan

# Messages of plain text, and messages with all their keys, as JSON (`datasets` reads it as such).
PlainMessages = Annotated[list[Message], pa.list_(pa.field("element", PLAIN_MESSAGE, nullable=False))]
Json = Annotated[str, pa.json_()]

_PAIR, _LABEL = ("prompt", "chosen", "rejected"), ("prompt", "completion")  # the texts of a row
_Logp = Float32 | None  # of a reference, where it is known
_INPUTS = {"tools": str | None, "documents": str | None, "chat_template_kwargs": Json}
_OF_PAIRS = {
    **dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), TokenIds),
    **dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps"), _Logp),
    "reward_gap": float,
}
_OF_LABELS = {**dict.fromkeys(("prompt_ids", "completion_ids"), TokenIds), "ref_logps": _Logp}


def _row_type(name: str, *columns: Mapping[str, Any]) -> type:
    """A type of rows with these columns, in their order."""
    return make_dataclass(name, [column for part in columns for column in part.items()], frozen=True)


# Preferences, then labels: conversations of role and content, conversations with more keys, plain text.
TrlPair = _row_type("TrlPair", dict.fromkeys(_PAIR, PlainMessages), _OF_PAIRS)
TrlRichPair = _row_type("TrlRichPair", dict.fromkeys(_PAIR, list[Json]), _INPUTS, _OF_PAIRS)
TrlTextPair = _row_type("TrlTextPair", dict.fromkeys(_PAIR, str), _OF_PAIRS)
TrlLabel = _row_type("TrlLabel", dict.fromkeys(_LABEL, PlainMessages), {"label": bool}, _OF_LABELS)
TrlRichLabel = _row_type("TrlRichLabel", dict.fromkeys(_LABEL, list[Json]), {"label": bool}, _INPUTS, _OF_LABELS)
TrlTextLabel = _row_type("TrlTextLabel", dict.fromkeys(_LABEL, str), {"label": bool}, _OF_LABELS)


def is_rich(sources: Sources) -> bool:
    """Whether a message of these runs has more keys than role and content, or a prompt has tools or the like."""
    has_extra = pl.element().struct.field("extra").is_not_null().any()
    in_prompts = pl.col("messages").list.eval(has_extra).list.first() | pl.col("template_inputs").is_not_null()
    prompts = scan(sources.prompts, Prompt).select(in_prompts.any()).collect(engine="streaming").item()
    answers = scan(sources.completions, Completion).select(pl.col("messages").is_not_null().any())
    return bool(prompts) or bool(answers.collect(engine="streaming").item())


def pairs(rows: pl.DataFrame, form: str, *, rich: bool) -> tuple[type, pa.Table]:
    """Rows of Pair in TRL's form, conversational (`trl`) or plain text (`trl-standard`)."""
    renamed = rows.with_columns(
        prompt_ids="prompt_token_ids", chosen_ids="chosen_token_ids", rejected_ids="rejected_token_ids"
    )
    types = {"trl": TrlRichPair if rich else TrlPair, "trl-standard": TrlTextPair}
    return _in_form(renamed, types[form], _PAIR[1:])


def labels(rows: pl.DataFrame, form: str, *, rich: bool) -> tuple[type, pa.Table]:
    """Rows of Label in TRL's form, conversational (`trl`) or plain text (`trl-standard`)."""
    renamed = rows.with_columns(prompt_ids="prompt_token_ids", completion_ids="token_ids")
    types = {"trl": TrlRichLabel if rich else TrlLabel, "trl-standard": TrlTextLabel}
    return _in_form(renamed, types[form], _LABEL[1:])


def _in_form(rows: pl.DataFrame, row_type: type, answers: tuple[str, ...]) -> tuple[type, pa.Table]:
    masked = rows.filter(pl.any_horizontal(pl.col("^.*loss_mask$").is_not_null()))
    if masked.height:
        raise DataError(
            f"{masked.height} rows have answers of several turns (first: prompt {masked['prompt_id'][0]}): TRL would "
            "score what tools and users say in them",
            "use --format prefpipe, and train with prefpipe",
        )
    names = arrow_schema(row_type).names
    if row_type in (TrlTextPair, TrlTextLabel):
        return row_type, _as_text(rows, answers).select(names).to_arrow()
    if row_type in (TrlPair, TrlLabel):
        role_and_content = pl.struct(pl.element().struct.field("role"), pl.element().struct.field("content"))
        return row_type, rows.with_columns(pl.col("prompt", *answers).list.eval(role_and_content)).select(
            names
        ).to_arrow()
    return row_type, _with_all_keys(rows, row_type, answers)


def _with_all_keys(rows: pl.DataFrame, row_type: type, answers: tuple[str, ...]) -> pa.Table:
    schema = arrow_schema(row_type)
    inputs = [json.loads(text) if text else {} for text in rows["template_inputs"]]
    columns: dict[str, list[Any]] = {
        name: [[to_json(as_dict(m)) for m in messages] for messages in rows[name].to_list()]
        for name in ("prompt", *answers)
    }
    for name in ("tools", "documents"):
        columns[name] = [to_json(given[name]) if name in given else None for given in inputs]
    columns["chat_template_kwargs"] = [to_json(given.get("chat_template_kwargs", {})) for given in inputs]
    others = rows.select(name for name in schema.names if name not in columns).to_arrow()
    return pa.table(
        [pa.array(columns[f.name]).cast(f.type) if f.name in columns else others[f.name] for f in schema],
        names=schema.names,
    )


def _as_text(rows: pl.DataFrame, answers: tuple[str, ...]) -> pl.DataFrame:
    turns = pl.col("prompt").list.len()
    first = pl.col("prompt").list.first().struct
    plain = pl.col("template_inputs").is_null() & first.field("extra").is_null()
    plain &= pl.all_horizontal(pl.col(n).list.first().struct.field("extra").is_null() for n in answers)
    other = rows.filter(~((turns == 1) & (first.field("role") == "user") & plain))
    if other.height:
        raise DataError(
            f"{other.height} rows are more than one user message and one answer of text (first: prompt "
            f"{other['prompt_id'][0]})",
            "plain text holds no roles, calls or tools: use --format trl",
        )
    return rows.with_columns(pl.col(n).list.first().struct.field("content").alias(n) for n in ("prompt", *answers))
