"""The rows of runs and files that a training run is given, as their datasets hold them, and the ledger of the rest."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from prefpipe.config.losses import Kind
from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError, UsageError
from prefpipe.inputs import files, tokenised
from prefpipe.inputs.kl_bank import kl_bank
from prefpipe.models.chat import Chat
from prefpipe.rows import why_dropped
from prefpipe.runs import store
from prefpipe.schemas import Dropped, KlBank, Label, Pair, RankedGroup, from_table
from prefpipe.stages.train import examples, lengths
from prefpipe.stages.train.examples import TrainGroup, TrainLabel, TrainPair, TrainRow

Stored = Pair | Label | RankedGroup | KlBank
_ROW_TYPES: dict[Kind, type[Pair] | type[Label] | type[RankedGroup]] = {
    "pairs": Pair,
    "labels": Label,
    "groups": RankedGroup,
}


@dataclass
class Read:
    """The rows of all sources; those to evaluate on come last."""

    rows: list[Stored] = field(default_factory=list[Stored])
    # For every row the number of its source among those of the settings.
    origins: list[int] = field(default_factory=list[int])
    bank: list[KlBank] = field(default_factory=list[KlBank])
    dropped: list[Dropped] = field(default_factory=list[Dropped])


def read(sources: Sequence[str], kind: Kind, chat: Chat | None, config: TrainConfig, context: int | None) -> Read:
    """The rows of the sources that `context` tokens hold."""
    limits = lengths.limits(config, context)
    found = Read()
    for number, source in enumerate(sources):
        if not files.is_run(source) and chat is not None and kind != "groups":
            read_rows = tokenised.read_pairs if kind == "pairs" else tokenised.read_labels
            rows, dropped = read_rows(source, chat, limits, files.renames(config.column))
            found.dropped += dropped
        else:
            row_type = _ROW_TYPES[kind]
            rows = from_table(row_type, store.read_dataset(Path(source), kind, row_type))
            if (Path(source) / "kl_bank").is_dir():
                found.bank += from_table(KlBank, store.read_dataset(Path(source), "kl_bank", KlBank))
        found.rows += rows
        found.origins += [number] * len(rows)
    within = lengths.within(found.rows, context, found.dropped)
    kept = set(map(id, within))
    found.origins = [number for number, row in zip(found.origins, found.rows, strict=True) if id(row) in kept]
    found.rows = within
    if not found.rows or not config.objective.needs("z0"):
        found.bank = []
    elif not found.bank:
        labels = [row for row in found.rows if isinstance(row, Label)]
        found.bank = kl_bank(labels, config.kl_bank_size, config.seed)
    found.bank = lengths.within(found.bank, context, found.dropped)
    return found


def add_held_out(found: Read, sources: Sequence[str], held_out: Read) -> None:
    """Put rows to evaluate on behind those to train on, so that both are checked, joined and scored alike."""
    if not held_out.rows:
        reasons = why_dropped(held_out.dropped)
        raise DataError(f"no row of {', '.join(sources)} can be evaluated on: {reasons}", "check the file")
    found.rows += held_out.rows
    found.origins += held_out.origins
    found.bank += held_out.bank
    found.dropped += held_out.dropped


def read_sft(config: TrainConfig, chat: Chat | None, context: int | None, dropped: list[Dropped]) -> list[TrainLabel]:
    """The rows to imitate; faulty ones go to `dropped`. Raises UsageError for a run, DataError when no row is left."""
    limits, columns = lengths.limits(config, context), files.renames(config.sft_column)
    rows: list[TrainLabel] = []
    faulty: list[Dropped] = []
    for source in config.sft:
        if files.is_run(source):
            raise UsageError(
                f"--sft {source} is a run: its completions are samples of a policy, good ones and bad ones",
                "give files of answers to imitate; for chosen completions of pairs add --loss-type nll",
            )
        assert chat is not None
        completions, of_source = tokenised.read_completions(source, chat, limits, columns)
        rows += examples.from_completions(completions)
        faulty += of_source
    dropped += faulty
    if config.sft and not rows:
        raise DataError(f"no row of {', '.join(config.sft)} can be imitated: {why_dropped(faulty)}", "check the file")
    return rows


def train_rows(kind: Kind, found: Read) -> list[TrainRow]:
    """The rows as training takes them, each with the number of its source."""
    rows: Sequence[TrainPair | TrainLabel | TrainGroup]
    if kind == "pairs":
        rows = examples.from_pairs([row for row in found.rows if isinstance(row, Pair)])
    elif kind == "labels":
        rows = examples.from_labels([row for row in found.rows if isinstance(row, Label)])
    else:
        rows = examples.from_groups([row for row in found.rows if isinstance(row, RankedGroup)])
    return [replace(row, source=number) for row, number in zip(rows, found.origins, strict=True)]
