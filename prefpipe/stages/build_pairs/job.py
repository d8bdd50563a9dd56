"""What the makers of pairs, labels and groups share: where to read and write, and what they hand back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.runs.store import Run
from prefpipe.stages.build_pairs.accounting import Level
from prefpipe.stages.build_pairs.candidates import Sources


@dataclass(frozen=True)
class Job:
    """One run: settings, input files, the run directory, the number of partitions and a folder for them."""

    config: BuildPairsConfig
    sources: Sources
    run: Run
    num_partitions: int
    folder: Path


@dataclass(frozen=True)
class Built:
    """What was made of the candidates: counts by level, ledger rows, totals of its own, and facts for the report.

    `facts` has one row per pair (or label), `sample` the texts of some of them; see data_report.
    """

    levels: Mapping[str, Level]
    ledger: pl.DataFrame
    totals: Mapping[str, Any]
    facts: pl.DataFrame
    sample: pl.DataFrame


def counts(ledger: pl.DataFrame) -> dict[str, int]:
    """Ledger rows by reason."""
    return dict(ledger.group_by("reason").len().sort("reason").iter_rows())
