"""Labels for KTO, and the KL bank: prompts with completions of other prompts."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import polars as pl

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.errors import DataError
from prefpipe.inputs import kl_bank
from prefpipe.runs.store import Run
from prefpipe.schemas import Dropped, KlBank, Label, from_table, to_table
from prefpipe.stages.build_pairs import filters, label_rules, output_rows, pairs, trl
from prefpipe.stages.build_pairs.accounting import BuildResult, Level, count_reasons
from prefpipe.stages.build_pairs.candidates import Workspace
from prefpipe.stages.build_pairs.partitions import cut


def build(workspace: Workspace, candidates: Sequence[pl.DataFrame]) -> BuildResult:
    """Write labels, one file per partition, and a KL bank of mismatched rows; count the completions without a label.

    Raises DataError when all labels have the same class.
    """
    config = workspace.config
    levels: dict[str, Level] = {}
    ledgers: list[pl.DataFrame] = []
    every = pl.concat(candidates)
    if config.label_rule == "pairs":
        filtered = pairs.filter_pairs(workspace, [pairs.apply_rule(part, config) for part in candidates])
        judged, levels = label_rules.from_pairs(filtered.pairs, every), dict(filtered.levels)
        ledgers.append(filtered.ledger)
    else:
        judged = label_rules.by_reward(every, config)
    useful = filters.kept(judged)
    contents = output_rows.fetch(workspace, useful.select("prompt_id", "completion_id"), "labels")
    compared = pl.concat(workspace.run(_by_content, cut(useful, workspace.num_partitions), contents))
    kept = output_rows.with_weights(filters.kept(compared), config)
    dropped = pl.concat([label_rules.ledger(judged), label_rules.ledger(compared)])
    levels["labels"] = Level(every.height, kept.height, count_reasons(dropped))
    balance = label_rules.balance(int(kept["label"].sum()), int((~kept["label"]).sum()))
    if kept.height and not (balance.desirable and balance.undesirable):
        only = f"all {kept.height} labels are {'desirable' if balance.desirable else 'undesirable'}"
        alike = kept.select(id="completion_id", reason=pl.lit("one_class"), detail=pl.lit(only))
        workspace.run_dir.write_dropped(Dropped, pl.concat([*ledgers, dropped, alike]).to_arrow())
        raise DataError(f"{only}: KTO needs both", "choose another --label-rule or --label-threshold")
    _write(workspace, kept, contents)
    classes = kept.group_by("prompt_id").agg(pl.col("label").n_unique())["label"]
    totals = {"labels": kept.height, "mixed_prompts": int((classes > 1).sum()), **asdict(balance)}
    return BuildResult(levels, pl.concat([*ledgers, dropped]), totals, pl.DataFrame(), pl.DataFrame())


def _by_content(labels: pl.DataFrame, contents: output_rows.Contents) -> pl.DataFrame:
    with_text = labels.join(contents.rows().select("completion_id", "text"), on="completion_id")
    return label_rules.by_content(with_text).drop("text")


def _write(workspace: Workspace, kept: pl.DataFrame, contents: Sequence[output_rows.Contents]) -> None:
    config = workspace.config
    # Enough prompts to use each about once in the bank; ids are hashes, so the lowest ones are a random choice.
    bank_prompts = kept["prompt_id"].unique().sort().head(max(2, 2 * config.kl_bank_rows))
    rich = config.format == "trl" and trl.is_rich(workspace.sources)
    write = partial(_write_partition, config, workspace.run_dir, bank_prompts, rich)
    bank_labels = [row for rows in workspace.map_filled(write, kept, contents) for row in rows]
    if bank_labels:
        bank = kl_bank.kl_bank(bank_labels, config.kl_bank_rows, config.seed)
        workspace.run_dir.write_part("kl_bank", KlBank, 0, to_table(KlBank, bank))


def _write_partition(
    config: BuildPairsConfig,
    run_dir: Run,
    bank_prompts: pl.Series,
    rich: bool,  # noqa: FBT001  (the arguments of a task have places)
    number: int,
    part: pl.DataFrame,
    contents: output_rows.Contents,
) -> list[Label]:
    """Write the labels of a partition. Returns the rows of its prompts that may enter the KL bank."""
    rows = output_rows.label_rows(part, contents.rows(), contents.of_prompts())
    if config.format != "prefpipe":
        row_type, table = trl.labels(rows, config.format, rich=rich)
        run_dir.write_part("trl", row_type, number, table)
        return []
    run_dir.write_part("labels", Label, number, output_rows.to_table(rows, Label))
    of_bank = rows.filter(pl.col("prompt_id").is_in(bank_prompts.implode()))
    return from_table(Label, output_rows.to_table(of_bank, Label))
