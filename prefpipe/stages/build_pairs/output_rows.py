"""Rows of the output datasets, from texts, token ids and log-probs of the completions in use.

Only completions that a pair, label or group uses are read, in one pass over the files. They are cut into the same
partitions as the candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa

from prefpipe.config.build_pairs import BuildPairsConfig, weighed_by
from prefpipe.errors import DataError
from prefpipe.ids import content_id
from prefpipe.rows import logps_of_other_ids, one_reference
from prefpipe.runs import fsio
from prefpipe.runs.storage import storage_errors
from prefpipe.schemas import Completion, Label, Pair, Prompt, RankedGroup, RefLogps, arrow_schema
from prefpipe.stages.build_pairs.candidates import Workspace
from prefpipe.stages.build_pairs.filters import SIDES
from prefpipe.stages.build_pairs.partitions import Files, batches, partition_of, scan, split

_OF_CANDIDATES = ("prompt_id", "sample_index", "finish_reason")  # columns that the rows have already, or do not need


@dataclass(frozen=True)
class Contents:
    """The completions in use of one partition: contents, reference log-probs, policy log-probs, and their prompts."""

    completions: pl.LazyFrame
    references: pl.LazyFrame
    policies: pl.LazyFrame
    prompts: pl.LazyFrame

    def rows(self) -> pl.DataFrame:
        """One row per completion: completion_id, text, messages, thinking, prompt_token_ids, token_ids, loss_mask,
        ids_digest, policy; ref_logps, ref_token_logps, reference and scorer (null without reference log-probs);
        policy_logps (null without them). `text` of an answer of several turns is a text of all turns: it is equal when
        each turn is.

        Raises IdentityError when log-probs belong to other token ids.
        """
        references = _one_per_completion(self.references)
        policies = _one_per_completion(self.policies).select("completion_id", policy_logps="ref_logps")
        joined = (
            self.completions.collect()
            .unique("completion_id")
            .join(references, on="completion_id", how="left")
            .join(policies, on="completion_id", how="left")
        )
        foreign = joined.filter(pl.col("digest") != pl.col("ids_digest")).sort("completion_id")
        if foreign.height:
            raise logps_of_other_ids(foreign["completion_id"].to_list(), "the inputs")
        whole = pl.when(pl.col("loss_mask").is_not_null()).then(pl.col("thinking").fill_null(""))
        return joined.drop("digest").with_columns(
            text=pl.concat_str(whole.otherwise(pl.lit("")), "text"),
            thinking=pl.when(pl.col("loss_mask").is_null()).then("thinking"),
        )

    def of_prompts(self) -> pl.DataFrame:
        """One row per prompt: prompt_id, template_inputs, and its messages as `prompt`."""
        return self.prompts.collect().unique("prompt_id")


def fetch(workspace: Workspace, used: pl.DataFrame, name: str) -> list[Contents]:
    """The contents of the completions `used` (prompt_id, completion_id), by partition. Several partitions lie in the
    folder `name`.

    Raises DataError when the runs hold log-probs of several references.
    """
    sources, count, folder = workspace.sources, workspace.num_partitions, workspace.folder / name
    used = used.unique().with_columns(partition=partition_of(count))
    wanted = _stored(used.select("completion_id", "partition"), count, folder / "used")
    columns = [name for name in arrow_schema(Completion).names if name not in _OF_CANDIDATES]
    completions = [scan(batch, Completion).select(columns) for batch in batches(sources.completions)]
    prompts = [
        scan(batch, Prompt).select("prompt_id", "template_inputs", prompt="messages")
        for batch in batches(sources.prompts)
    ]
    used_prompts = _stored(used.select("prompt_id", "partition").unique(), count, folder / "used_prompts")
    references, policies = _references(sources.ref_logps), _references(sources.policy_logps)

    def matching(frames: Sequence[pl.LazyFrame], keys: pl.LazyFrame, key: str, name: str) -> list[pl.LazyFrame]:
        return split([frame.join(keys, on=key) for frame in frames], count, folder / name, workspace.run)

    parts = zip(
        matching(completions, wanted, "completion_id", "completions"),
        matching(references, wanted, "completion_id", "references"),
        matching(policies, wanted, "completion_id", "policies"),
        matching(prompts, used_prompts, "prompt_id", "prompts"),
        strict=True,
    )
    return [Contents(*part) for part in parts]


def _stored(keys: pl.DataFrame, count: int, path: Path) -> pl.LazyFrame:
    """The keys to join with batches of files: in memory, or with several partitions in a file for all tasks."""
    if count == 1:
        return keys.lazy()
    fsio.make_dirs(path.parent)
    with storage_errors(path):
        keys.write_ipc(path)
    return pl.scan_ipc(path, glob=False)


def sides(pairs: pl.DataFrame, contents: pl.DataFrame) -> pl.DataFrame:
    """Pairs with the content of both completions, as columns chosen_* and rejected_*.

    Raises DataError when the sides of a pair have different token ids for their prompt.
    """
    for side in SIDES:
        content = contents.select(pl.all().name.prefix(f"{side}_"))
        pairs = pairs.join(content, on=f"{side}_completion_id", how="left", maintain_order="left")
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
    """Rows of Pair, by prompt, best chosen first, worst rejected first. `pairs` comes from `sides` and has `weight`."""
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
        *(_answer(f"{side}_").alias(side) for side in SIDES),
        prompt_token_ids=pl.col("chosen_prompt_token_ids"),
        pair_id=pl.Series(ids, dtype=pl.String),
        preference_prob=soft if config.preference_prob == "bradley-terry" else pl.lit(None, pl.Float64),
        reference=pl.when(one_scorer).then("chosen_reference"),
        scorer=pl.when(one_scorer).then("chosen_scorer"),
    )


def label_rows(labels: pl.DataFrame, contents: pl.DataFrame, prompts: pl.DataFrame) -> pl.DataFrame:
    """Rows of Label, in order of prompt_id and completion_id. `labels` has label, reward, finish_reason and weight."""
    rows = _with_prompts(labels.join(contents, on="completion_id", how="left"), prompts)
    return rows.sort("prompt_id", "completion_id").with_columns(completion=_answer())


def group_rows(ranked: pl.DataFrame, contents: pl.DataFrame, prompts: pl.DataFrame) -> pl.DataFrame:
    """Rows of RankedGroup. `ranked` has prompt_id, completion_id, reward, finish_reason, best first within a prompt.

    A group has log-probs when one scorer computed them for all of its completions; else they are null.
    """
    rows = ranked.join(contents, on="completion_id", how="left", maintain_order="left")
    if rows.filter(pl.col("prompt_token_ids") != pl.col("prompt_token_ids").first().over("prompt_id")).height:
        raise DataError("a group joins completions whose prompt has other token ids", "score all runs with one model")
    whole = pl.col("scorer").is_not_null().all() & (pl.col("scorer").n_unique() == 1)
    groups = rows.group_by("prompt_id", maintain_order=True).agg(
        pl.col("prompt_token_ids").first(),
        completion_ids="completion_id",
        completions=_answer(),
        token_ids="token_ids",
        loss_masks=_mask(),
        masked=pl.col("loss_mask").is_not_null().any(),
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
    masks = pl.when("masked").then("loss_masks").alias("loss_masks")
    return _with_prompts(groups, prompts).with_columns(*cached, masks, weight=pl.lit(1.0)).sort("prompt_id")


def to_table(rows: pl.DataFrame, row_type: type[Pair | Label | RankedGroup]) -> pa.Table:
    """The columns of a row type, as Arrow."""
    return rows.select(arrow_schema(row_type).names).to_arrow()


def _references(files: Files) -> list[pl.LazyFrame]:
    """Cached log-probs, by batch of files. Raises DataError when they are of several references."""
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
    one_reference(scan(files, RefLogps).select(pl.col("reference").unique()).collect(engine="streaming")["reference"])
    renamed = {"ids_digest": "digest", "token_logps": "ref_token_logps"}
    return [scan(batch, RefLogps).rename(renamed).select(*empty) for batch in batches(files)]


def _one_per_completion(frame: pl.LazyFrame) -> pl.DataFrame:
    """One row per completion: of several (two scorers, or a run that is listed twice) always the same one."""
    return frame.collect().sort("completion_id", "scorer", "ref_logps").unique("completion_id", keep="first")


def _with_prompts(rows: pl.DataFrame, prompts: pl.DataFrame) -> pl.DataFrame:
    joined = rows.join(prompts, on="prompt_id", how="left", maintain_order="left")
    lost = joined.filter(pl.col("prompt").is_null())["prompt_id"]
    if len(lost):
        raise DataError(
            f"{lost.n_unique()} prompts are in no prompts/ of these runs (first: {lost.min()})",
            "a run with completions holds their prompts: make it again",
        )
    return joined


def _answer(prefix: str = "") -> pl.Expr:
    """The turns of an answer: those in the file that it comes from, else one turn with its reasoning and text."""
    content = pl.col(f"{prefix}thinking").fill_null("") + pl.col(f"{prefix}text")
    turn = pl.struct(role=pl.lit("assistant"), content=content, extra=pl.lit(None, pl.String))
    return pl.coalesce(f"{prefix}messages", pl.concat_list(turn))


def _mask() -> pl.Expr:
    """The loss mask of a completion; where the row has none, a mask that scores every token."""
    return pl.coalesce("loss_mask", pl.col("token_ids").list.eval(pl.element() >= 0))


def with_weights(frame: pl.DataFrame, config: BuildPairsConfig) -> pl.DataFrame:
    """A column `weight` with mean 1: the same for every row, or with the same sum for every prompt."""
    of_rule = weighed_by(config.rule) if config.output == "pairs" else "pair"
    weigh_by = of_rule if config.weight_by == "rule" else config.weight_by
    if weigh_by == "pair" or frame.is_empty():
        return frame.with_columns(weight=pl.lit(1.0))
    per_prompt = frame.height / frame["prompt_id"].n_unique()
    return frame.with_columns(weight=per_prompt / pl.len().over("prompt_id"))
