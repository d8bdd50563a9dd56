"""Candidates -> labels for KTO, and the KL bank of mismatched rows."""

from collections.abc import Sequence

import polars as pl

from prefpipe.errors import DataError
from prefpipe.inputs import kl_bank
from prefpipe.schemas import KlBank, Label, from_table, to_table
from prefpipe.stages.build_pairs import filters, label_rules, output_rows, pairs, trl
from prefpipe.stages.build_pairs.accounting import Level
from prefpipe.stages.build_pairs.candidates import cut
from prefpipe.stages.build_pairs.job import Built, Job, counts


def build(job: Job, candidates: Sequence[pl.DataFrame]) -> Built:
    """Write labels, one part per partition, and a KL bank of mismatched rows; say what became of the others."""
    levels: dict[str, Level] = {}
    ledgers: list[pl.DataFrame] = []
    every = pl.concat(candidates)
    if job.config.label_rule == "pairs":
        judged_pairs = pairs.judge(job, [pairs.find(own, job.config) for own in candidates])
        judged, levels = label_rules.from_pairs(judged_pairs.pairs, every), dict(judged_pairs.levels)
        ledgers.append(judged_pairs.ledger)
    else:
        judged = label_rules.by_reward(every, job.config)
    useful = filters.kept(judged)
    contents = output_rows.fetch(
        job.sources, useful.select("prompt_id", "completion_id"), job.num_partitions, job.folder / "labels"
    )
    compared = pl.concat(
        label_rules.by_content(own.join(contents.of(number).select("completion_id", "text"), on="completion_id")).drop(
            "text"
        )
        for number, own in enumerate(cut(useful, job.num_partitions))
    )
    kept = output_rows.with_weights(filters.kept(compared), job.config)
    ledgers += [label_rules.ledger(judged), label_rules.ledger(compared)]
    dropped = pl.concat(ledgers[-2:])
    levels["labels"] = Level(every.height, kept.height, counts(dropped))
    shares = label_rules.balance(int(kept["label"].sum()), int((~kept["label"]).sum()))
    if kept.height and not (shares.desirable and shares.undesirable):
        raise DataError(
            f"all {kept.height} labels are {'desirable' if shares.desirable else 'undesirable'}: KTO needs both",
            "choose another --label-rule or --label-threshold",
        )
    _write(job, kept, contents)
    totals = {
        "labels": kept.height,
        "desirable": shares.desirable,
        "undesirable": shares.undesirable,
        "desirable_weight": shares.desirable_weight,
        "undesirable_weight": shares.undesirable_weight,
    }
    return Built(levels, pl.concat(ledgers), totals, pl.DataFrame(), pl.DataFrame())


def _write(job: Job, kept: pl.DataFrame, contents: output_rows.Contents) -> None:
    # Enough prompts for a bank in which each is used about once; ids are hashes, so the first ones are a random choice.
    of_bank = kept["prompt_id"].unique().sort().head(max(2, 2 * job.config.kl_bank_rows))
    bank: list[Label] = []
    number = 0
    for partition, own in enumerate(cut(kept, job.num_partitions)):
        if own.is_empty():
            continue
        made = output_rows.label_rows(own, contents.of(partition), contents.prompts_of(partition))
        if job.config.format == "prefpipe":
            job.run.write_part("labels", Label, number, output_rows.to_table(made, Label))
            chosen = made.filter(pl.col("prompt_id").is_in(of_bank.implode()))
            bank += from_table(Label, output_rows.to_table(chosen, Label))
        else:
            row_type, table = trl.labels(made, job.config.format)
            job.run.write_part("trl", row_type, number, table)
        number += 1
    if bank:
        made_bank = kl_bank.kl_bank(bank, job.config.kl_bank_rows, job.config.seed)
        job.run.write_part("kl_bank", KlBank, 0, to_table(KlBank, made_bank))
