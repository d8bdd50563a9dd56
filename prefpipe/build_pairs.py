"""Stage 2, `prefpipe build-pairs`: completions with rewards -> pairs, and a ledger of every candidate that is none."""

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa

from prefpipe import log, store
from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.errors import DataError, UsageError
from prefpipe.ids import content_id
from prefpipe.schemas import Completion, Dropped, Pair, Prompt, RefLogps, Reward, arrow_schema
from prefpipe.store import Manifest

_SIDES = ("chosen", "rejected")


def run(config: BuildPairsConfig, out: Path, *, force: bool) -> Manifest:
    """Read the runs, select pairs, write pairs and ledger."""
    if not config.completions:
        raise UsageError("no completions given", "pass --completions DIR (a run of prefpipe generate)")
    runs = [Path(directory) for directory in config.completions]
    inputs = {f"completions.{i}": store.input_digest(path) for i, path in enumerate(runs)}
    with store.open_run(out, "build-pairs", config, inputs, force=force) as run_:
        manifest = run_.manifest()
        if manifest is not None:
            log.info(f"{out} is complete already")
            return manifest
        completions = _read(runs, "completions", Completion).unique("completion_id", keep="first", maintain_order=True)
        rewards = _read(runs, f"rewards/{config.reward}", Reward)
        rated = _with_rewards(completions, rewards)
        selected = RULES[config.rule](rated, config.pairs_per_prompt)
        kept, dropped = keep_useful(selected, config.min_gap, drop_truncated_chosen=config.truncated_chosen == "drop")
        ledger = pl.concat([_unrated(completions, rated), _unpaired(rated, selected), dropped])
        run_.write_dropped(Dropped, ledger.to_arrow())
        if kept.is_empty():
            reasons = ", ".join(f"{r}: {n}" for r, n in _counts(ledger).items())
            raise DataError(f"no pair is left ({reasons})", f"see {out}/dropped.parquet for every row and its reason")
        run_.write_part("pairs", Pair, 0, _to_pairs(kept, completions, runs))
        totals = {
            "completions": completions.height,
            "prompts": completions["prompt_id"].n_unique(),
            "candidates": selected.height,
            "pairs": kept.height,
            "dropped": _counts(ledger),
            "mean_reward_gap": float(kept.select(pl.col("reward_gap").mean()).item()),
            "chosen_longer": float(kept.select((pl.col("chosen_tokens") > pl.col("rejected_tokens")).mean()).item()),
        }
        policies = sorted(completions["policy"].unique())
        return run_.finish(totals, {"reward": config.reward, "policies": policies})


def summary(manifest: Manifest, out: Path) -> list[str]:
    """What the command prints when it is done."""
    t = manifest["totals"]
    reasons = ", ".join(f"{reason}: {count}" for reason, count in t["dropped"].items()) or "nothing"
    return [
        f"{t['pairs']} pairs from {t['completions']} completions of {t['prompts']} prompts in {out}",
        f"  mean reward_gap {t['mean_reward_gap']:.3f}, chosen longer than rejected in {t['chosen_longer']:.0%}",
        f"  dropped: {reasons}",
    ]


def best_worst(rated: pl.DataFrame, pairs_per_prompt: int) -> pl.DataFrame:
    """The k-th best completion of a prompt with its k-th worst, k = 1..pairs_per_prompt, none used twice.

    `rated` has prompt_id, completion_id, reward, text, finish_reason, num_tokens. Equal rewards are ordered by
    completion_id, so that row order never matters. Columns come back as chosen_* and rejected_*, with reward_gap.
    """
    ordered = rated.sort("prompt_id", pl.col("reward"), "completion_id", descending=[False, True, False]).with_columns(
        rank=pl.int_range(pl.len()).over("prompt_id"), count=pl.len().over("prompt_id")
    )
    limit = pl.min_horizontal(pl.lit(pairs_per_prompt), pl.col("count") // 2)
    best = _side(ordered.filter(pl.col("rank") < limit).with_columns(k=pl.col("rank")), "chosen")
    reverse = pl.col("count") - 1 - pl.col("rank")
    worst = _side(ordered.filter(reverse < limit).with_columns(k=reverse), "rejected")
    return best.join(worst, on=["prompt_id", "k"], maintain_order="left").with_columns(
        reward_gap=pl.col("chosen_reward") - pl.col("rejected_reward")
    )


RULES: dict[str, Callable[[pl.DataFrame, int], pl.DataFrame]] = {"best-worst": best_worst}


def keep_useful(
    selected: pl.DataFrame, min_gap: float, *, drop_truncated_chosen: bool
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Split candidate pairs into the useful ones and ledger rows: identical text, tie, small gap, truncated chosen."""
    truncated = (pl.col("chosen_finish_reason") == "length") & pl.lit(drop_truncated_chosen)
    reason = (
        pl.when(pl.col("chosen_text") == pl.col("rejected_text")).then(pl.lit("identical_text"))
        .when(pl.col("reward_gap") == 0).then(pl.lit("tie"))
        .when(pl.col("reward_gap") <= min_gap).then(pl.lit("small_gap"))
        .when(truncated).then(pl.lit("truncated_chosen"))
    )  # fmt: skip
    judged = selected.with_columns(reason=reason)
    dropped = judged.filter(pl.col("reason").is_not_null()).select(
        id=pl.concat_str("chosen_completion_id", "rejected_completion_id", separator=">"),
        reason="reason",
        detail=pl.format("reward_gap {}", pl.col("reward_gap").round(6)),
    )
    return judged.filter(pl.col("reason").is_null()).drop("reason"), dropped


def _side(frame: pl.DataFrame, side: str) -> pl.DataFrame:
    columns = {"completion_id": "completion_id", "reward": "reward", "text": "text"}
    columns |= {"finish_reason": "finish_reason", "num_tokens": "tokens"}
    return frame.select("prompt_id", "k", *(pl.col(c).alias(f"{side}_{name}") for c, name in columns.items()))


def _with_rewards(completions: pl.DataFrame, rewards: pl.DataFrame) -> pl.DataFrame:
    foreign = rewards.join(completions, on="completion_id", how="anti").height
    if foreign:
        raise DataError(f"{foreign} rewards belong to no completion of these runs", "pass the runs they were made for")
    usable = (
        rewards.filter(pl.col("reward").is_not_null())
        .unique("completion_id", keep="first", maintain_order=True)
        .select("completion_id", "reward")
    )
    return completions.join(usable, on="completion_id", maintain_order="left").select(
        "prompt_id",
        "completion_id",
        "reward",
        "finish_reason",
        text=pl.col("text").map_elements(_normal, return_dtype=pl.String),
        num_tokens=pl.col("token_ids").list.len(),
    )


def _normal(text: str) -> str:
    """Texts that a reader cannot tell apart are the same."""
    return unicodedata.normalize("NFC", text).strip()


def _unrated(completions: pl.DataFrame, rated: pl.DataFrame) -> pl.DataFrame:
    missing = completions.join(rated, on="completion_id", how="anti")
    return _ledger(missing, "completion_id", "no_reward", "the reward is null or missing")


def _unpaired(rated: pl.DataFrame, selected: pl.DataFrame) -> pl.DataFrame:
    missing = rated.join(selected, on="prompt_id", how="anti").unique("prompt_id", maintain_order=True)
    return _ledger(missing, "prompt_id", "too_few", "a pair needs two rated completions of the prompt")


def _ledger(frame: pl.DataFrame, column: str, reason: str, detail: str) -> pl.DataFrame:
    return frame.select(id=pl.col(column), reason=pl.lit(reason), detail=pl.lit(detail))


def _counts(ledger: pl.DataFrame) -> dict[str, int]:
    return dict(ledger.group_by("reason").len().sort("reason").iter_rows())


def _to_pairs(kept: pl.DataFrame, completions: pl.DataFrame, runs: Sequence[Path]) -> pa.Table:
    """Fetch texts, ids and reference log-probs for the chosen rows only, and lay them out as pairs."""
    pairs = kept.join(
        _read(runs, "prompts", Prompt).unique("prompt_id").select("prompt_id", prompt="messages"),
        on="prompt_id",
        maintain_order="left",
    )
    tokens = completions.select("completion_id", "prompt_token_ids", "token_ids", "ids_digest", raw_text="text")
    references = _references(runs)
    for side in _SIDES:
        key = f"{side}_completion_id"
        own = tokens.select(
            pl.col("completion_id").alias(key),
            *([pl.col("prompt_token_ids")] if side == "chosen" else []),
            pl.col("token_ids").alias(f"{side}_token_ids"),
            pl.col("ids_digest").alias(f"{side}_ids_digest"),
            _as_message("raw_text").alias(side),
        )
        logps = references.select(
            pl.col("completion_id").alias(key),
            pl.col("ref_logps").alias(f"ref_{side}_logps"),
            pl.col("token_logps").alias(f"ref_{side}_token_logps"),
            pl.col("reference").alias(f"{side}_reference"),
            pl.col("scorer").alias(f"{side}_scorer"),
        )
        pairs = pairs.join(own, on=key, maintain_order="left")
        pairs = pairs.join(logps, on=key, how="left", maintain_order="left")
    ids = [content_id(c, r) for c, r in pairs.select("chosen_completion_id", "rejected_completion_id").iter_rows()]
    one_scorer = pl.col("chosen_scorer") == pl.col("rejected_scorer")  # null unless both sides have values
    pairs = pairs.with_columns(
        pl.when(one_scorer).then(pl.col(name))
        for side in _SIDES
        for name in (f"ref_{side}_logps", f"ref_{side}_token_logps")
    ).with_columns(
        reference=pl.when(one_scorer).then("chosen_reference"), scorer=pl.when(one_scorer).then("chosen_scorer")
    )
    return (
        pairs.with_columns(
            pair_id=pl.Series(ids, dtype=pl.String), preference_prob=pl.lit(None, dtype=pl.Float64), weight=pl.lit(1.0)
        )
        .select(arrow_schema(Pair).names)
        .to_arrow()
    )


def _as_message(column: str) -> pl.Expr:
    return pl.concat_list(pl.struct(role=pl.lit("assistant"), content=pl.col(column)))


def _references(runs: Sequence[Path]) -> pl.DataFrame:
    """Cached reference log-probs of the runs that have them; values of two references never mix."""
    having = [r for r in runs if any(n.startswith("ref_logps/") for n in store.read_manifest(r)["files"])]
    if not having:
        return _frame(arrow_schema(RefLogps).empty_table())
    found = _read(having, "ref_logps", RefLogps).unique("completion_id", keep="first")
    names = found["reference"].unique().sort().to_list()
    if len(names) > 1:
        raise DataError(
            f"the runs hold log-probs of {len(names)} references: {', '.join(names)}", "pass runs with one reference"
        )
    return found


def _read(runs: Sequence[Path], dataset: str, row_type: type) -> pl.DataFrame:
    return pl.concat([_frame(store.read_dataset(run, dataset, row_type)) for run in runs])


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame
