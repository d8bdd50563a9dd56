"""Texts, token ids and log-probs of the chosen rows -> rows of the output datasets.

Only completions that some pair, label or group uses are fetched, in one pass over the files, and cut into the same
partitions as the candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.errors import DataError, IdentityError
from prefpipe.ids import content_id
from prefpipe.schemas import Completion, Label, Pair, RankedGroup, arrow_schema
from prefpipe.stages.build_pairs.candidates import Files, Sources, partition_of, pieces, scan, split

SIDES = ("chosen", "rejected")
_OF_CANDIDATES = ("prompt_id", "sample_index", "finish_reason")  # columns that rows have already, or do not need


@dataclass(frozen=True)
class Contents:
    """What belongs to the used completions and prompts, by partition."""

    completions: Sequence[pl.LazyFrame]
    references: Sequence[pl.LazyFrame]
    policies: Sequence[pl.LazyFrame]
    prompts: Sequence[pl.LazyFrame]

    def of(self, number: int) -> pl.DataFrame:
        """completion_id with text, prompt_token_ids, token_ids, ids_digest, policy; ref_logps, ref_token_logps,
        reference and scorer (null without a cache); policy_logps (null without one)."""
        references = _one_per_completion(self.references[number])
        policies = _one_per_completion(self.policies[number]).select("completion_id", policy_logps="ref_logps")
        found = (
            self.completions[number]
            .collect()
            .unique("completion_id")
            .join(references, on="completion_id", how="left")
            .join(policies, on="completion_id", how="left")
        )
        foreign = found.filter(pl.col("digest") != pl.col("ids_digest")).sort("completion_id")
        if foreign.height:
            raise IdentityError(
                f"the log-probs of {foreign.height} completions were made for other token ids (first: completion "
                f"{foreign['completion_id'][0]})",
                "score these completions again: prefpipe score",
            )
        return found.drop("digest")

    def prompts_of(self, number: int) -> pl.DataFrame:
        """prompt_id and its messages as `prompt`."""
        return self.prompts[number].collect().unique("prompt_id")


def fetch(sources: Sources, used: pl.DataFrame, count: int, folder: Path) -> Contents:
    """Read what belongs to `used` (prompt_id, completion_id). Raises DataError when two references are mixed."""
    used = used.unique().with_columns(partition=partition_of(count))
    wanted = used.lazy().select("completion_id", "partition")
    columns = [name for name in arrow_schema(Completion).names if name not in _OF_CANDIDATES]
    completions = [scan(piece).select(columns) for piece in pieces(sources.completions)]
    prompts = [scan(piece).select("prompt_id", prompt="messages") for piece in pieces(sources.prompts)]
    used_prompts = used.lazy().select("prompt_id", "partition").unique()

    references, policies = _references(sources.ref_logps), _references(sources.policy_logps)

    def cut(frames: Sequence[pl.LazyFrame], chosen: pl.LazyFrame, key: str, name: str) -> list[pl.LazyFrame]:
        return split([frame.join(chosen, on=key) for frame in frames], count, folder / name)

    return Contents(
        completions=cut(completions, wanted, "completion_id", "completions"),
        references=cut(references, wanted, "completion_id", "references"),
        policies=cut(policies, wanted, "completion_id", "policies"),
        prompts=cut(prompts, used_prompts, "prompt_id", "prompts"),
    )


def sides(pairs: pl.DataFrame, contents: pl.DataFrame) -> pl.DataFrame:
    """Pairs with the content of both completions, as chosen_* and rejected_*. Raises DataError for mixed tokenizers."""
    for side in SIDES:
        own = contents.select(pl.all().name.prefix(f"{side}_"))
        pairs = pairs.join(own, on=f"{side}_completion_id", how="left", maintain_order="left")
    other = pairs.filter(pl.col("chosen_prompt_token_ids") != pl.col("rejected_prompt_token_ids"))
    if other.height:
        first = other.sort("prompt_id").row(0, named=True)
        raise DataError(
            f"{other.height} pairs join completions whose prompt has other token ids (first: prompt "
            f"{first['prompt_id']}, completions {first['chosen_completion_id']} and {first['rejected_completion_id']})",
            "the runs used different tokenizers or chat templates: score all of them with one model first",
        )
    return pairs


def pair_rows(pairs: pl.DataFrame, prompts: pl.DataFrame, config: BuildPairsConfig) -> pl.DataFrame:
    """Rows of Pair, by prompt, best chosen first, worst rejected first. `pairs` comes from `sides`, with weight."""
    order = ["prompt_id", "chosen_reward", "chosen_completion_id", "rejected_reward", "rejected_completion_id"]
    pairs = _with_prompts(pairs, prompts).sort(order, descending=[name == "chosen_reward" for name in order])
    ids = [content_id(c, r) for c, r in pairs.select("chosen_completion_id", "rejected_completion_id").iter_rows()]
    one_scorer = pl.col("chosen_scorer") == pl.col("rejected_scorer")  # null unless both sides have values
    soft = 1 / (1 + (-pl.col("reward_gap") / config.preference_scale).exp())
    return pairs.with_columns(
        *(
            pl.when(one_scorer).then(f"{side}_ref_{name}").alias(f"ref_{side}_{name}")
            for side in SIDES
            for name in ("logps", "token_logps")
        ),
        *(_as_messages(f"{side}_text").alias(side) for side in SIDES),
        prompt_token_ids=pl.col("chosen_prompt_token_ids"),
        pair_id=pl.Series(ids, dtype=pl.String),
        preference_prob=soft if config.preference_prob == "bradley-terry" else pl.lit(None, pl.Float64),
        reference=pl.when(one_scorer).then("chosen_reference"),
        scorer=pl.when(one_scorer).then("chosen_scorer"),
    )


def label_rows(labels: pl.DataFrame, contents: pl.DataFrame, prompts: pl.DataFrame) -> pl.DataFrame:
    """Rows of Label, in order of prompt_id and completion_id. `labels` has label, reward, finish_reason and weight."""
    rows = _with_prompts(labels.join(contents, on="completion_id", how="left"), prompts)
    return rows.sort("prompt_id", "completion_id").with_columns(completion=_as_messages("text"))


def group_rows(ranked: pl.DataFrame, contents: pl.DataFrame, prompts: pl.DataFrame) -> pl.DataFrame:
    """Rows of RankedGroup. `ranked` has prompt_id, completion_id, reward, finish_reason; best first in a prompt.

    Log-probs are there when every completion of the group has them, from one scorer.
    """
    rows = ranked.join(contents, on="completion_id", how="left", maintain_order="left")
    if rows.filter(pl.col("prompt_token_ids") != pl.col("prompt_token_ids").first().over("prompt_id")).height:
        raise DataError("a group joins completions whose prompt has other token ids", "score all runs with one model")
    whole = pl.col("scorer").is_not_null().all() & (pl.col("scorer").n_unique() == 1)
    groups = rows.group_by("prompt_id", maintain_order=True).agg(
        pl.col("prompt_token_ids").first(),
        completion_ids="completion_id",
        completions=_as_messages("text"),
        token_ids="token_ids",
        ids_digests="ids_digest",
        rewards="reward",
        finish_reasons="finish_reason",
        ref_logps=pl.col("ref_logps"),
        ref_token_logps=pl.col("ref_token_logps"),
        reference=pl.col("reference").first(),
        scorer=pl.col("scorer").first(),
        whole=whole,
    )
    cached = [
        pl.when("whole").then(name).alias(name) for name in ("ref_logps", "ref_token_logps", "reference", "scorer")
    ]
    return _with_prompts(groups, prompts).with_columns(*cached, weight=pl.lit(1.0)).sort("prompt_id")


def to_table(rows: pl.DataFrame, row_type: type[Pair | Label | RankedGroup]) -> pa.Table:
    """The columns of a row type, as Arrow."""
    return rows.select(arrow_schema(row_type).names).to_arrow()


def _references(files: Files) -> list[pl.LazyFrame]:
    """Cached log-probs, piece by piece; values of two references never mix."""
    empty = {
        "completion_id": pl.String,
        "reference": pl.String,
        "scorer": pl.String,
        "digest": pl.String,
        "ref_token_logps": pl.List(pl.Float32),
        "ref_logps": pl.Float32,
    }
    if not files:
        return [pl.LazyFrame(schema=empty)]
    names = sorted(scan(files).select(pl.col("reference").unique()).collect(engine="streaming")["reference"])
    if len(names) > 1:
        raise DataError(
            f"the runs hold log-probs of {len(names)} references: {', '.join(names)}", "pass runs with one reference"
        )
    renamed = {"ids_digest": "digest", "token_logps": "ref_token_logps"}
    return [scan(piece).rename(renamed).select(*empty) for piece in pieces(files)]


def _one_per_completion(frame: pl.LazyFrame) -> pl.DataFrame:
    """Of several values of a completion (a run given twice, two scorers) always the same one."""
    return frame.collect().sort("completion_id", "scorer", "ref_logps").unique("completion_id", keep="first")


def _with_prompts(rows: pl.DataFrame, prompts: pl.DataFrame) -> pl.DataFrame:
    found = rows.join(prompts, on="prompt_id", how="left", maintain_order="left")
    lost = found.filter(pl.col("prompt").is_null())["prompt_id"]
    if len(lost):
        raise DataError(
            f"{lost.n_unique()} prompts are in no prompts/ of these runs (first: {lost.min()})",
            "a run with completions holds their prompts: make it again",
        )
    return found


def _as_messages(column: str) -> pl.Expr:
    return pl.concat_list(pl.struct(role=pl.lit("assistant"), content=pl.col(column)))


def with_weights(frame: pl.DataFrame, config: BuildPairsConfig) -> pl.DataFrame:
    """A column `weight` with mean 1: the same for every row, or for every prompt in sum."""
    all_pairs = config.rule == "all-above-gap" and config.output == "pairs"
    by_prompt = config.weight_by == "prompt" or (config.weight_by == "rule" and all_pairs)
    if not by_prompt or frame.is_empty():
        return frame.with_columns(weight=pl.lit(1.0))
    per_prompt = frame.height / frame["prompt_id"].n_unique()
    return frame.with_columns(weight=per_prompt / pl.len().over("prompt_id"))
