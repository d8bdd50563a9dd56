"""The rows of runs and files that a training run is given: read part by part, checked, and written as record batches of
rows to train on. A part of a run is held at a time, and some rows of a file from elsewhere.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar, cast

from prefpipe.config.losses import Kind
from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError, UsageError
from prefpipe.inputs import files, tokenised
from prefpipe.inputs.kl_bank import kl_bank
from prefpipe.models.chat import Chat
from prefpipe.rows import check_ids, completions_of, key_of, why_dropped, with_ref_logps
from prefpipe.runs import store
from prefpipe.schemas import Dropped, KlBank, Label, Pair, RankedGroup, RefLogps, from_table
from prefpipe.stages.train import columns, examples, lengths
from prefpipe.stages.train.examples import TrainGroup, TrainLabel, TrainPair, TrainRow
from prefpipe.stages.train.record_batches import Batch, encode
from prefpipe.stages.train.row_files import Facts, Writer
from prefpipe.stages.train.spool import LabelAt, Spool

Stored = Pair | Label | RankedGroup | KlBank
T = TypeVar("T")
_ROW_TYPES: dict[Kind, type[Pair] | type[Label] | type[RankedGroup]] = {
    "pairs": Pair,
    "labels": Label,
    "groups": RankedGroup,
}
_CHUNK = 4096  # rows that are Python objects at a time
_BATCH = 16384  # rows of a record batch


@dataclass
class Read:
    """What was read: how many rows, how many of them are kept, the bank, the ledger of the rest, and the names of the
    references and scorers of the values."""

    count: int = 0
    kept: int = 0
    bank: list[KlBank] = field(default_factory=list[KlBank])
    dropped: list[Dropped] = field(default_factory=list[Dropped])
    names: dict[str, set[str]] = field(default_factory=lambda: {"reference": set[str](), "scorer": set[str]()})


class Sources:
    """Runs and files with rows of one kind, of which the model takes those that `context` tokens hold. What is needed
    twice lies in `folder` meanwhile."""

    def __init__(
        self,
        names: Sequence[str],
        kind: Kind,
        chat: Chat | None,
        config: TrainConfig,
        context: int | None,
        folder: Path,
    ) -> None:
        self.names, self._chat, self._config, self._context, self._folder = names, chat, config, context, folder
        self.kind: Kind = kind
        self._spools: dict[int, Spool] = {}  # sources that were read, where they are needed again
        needed = config.objective.needs("z0")
        self._bank = [row for name in names for row in _bank_of(Path(name))] if needed else []
        self._labels: list[LabelAt] | None = [] if needed and not self._bank else None  # what a bank is to be made of

    def digests(self) -> dict[str, str]:
        """The ids_digest of every completion of rows and bank, by its id."""
        found, digests = Read(), dict[str, str]()
        for number in range(len(self.names)):
            for rows in self._rows(number, found):
                digests |= {key: digest for row in rows for key, *_, digest in completions_of(row)}
        self._read_bank(found)
        return digests | {key: digest for row in found.bank for key, *_, digest in completions_of(row)}

    def write(self, rows: Writer, bank: Writer, values: Mapping[str, RefLogps]) -> Read:
        """Append the rows and their bank. A row whose completions all have `values` gets these reference log-probs.

        Raises IdentityError for token ids of another digest, DataError when rows were read and none fits.
        """
        found = Read()
        for number, name in enumerate(self.names):
            as_columns = self._row_type in (Pair, Label) and files.is_run(name) and not values
            if as_columns and self._labels is None:
                self._write_columns(number, rows, found)
                continue
            for chunk in self._rows(number, found):
                self._write(chunk, number, rows, found, values)
                found.kept += len(chunk)
        lengths.check_left(found.count, found.kept, self._context)
        self._read_bank(found)
        self._write(found.bank, 0, bank, found, values)
        return found

    @property
    def _row_type(self) -> type[Pair] | type[Label] | type[RankedGroup]:
        return _ROW_TYPES[self.kind]

    def _rows(self, number: int, found: Read) -> Iterator[list[Stored]]:
        """The rows of a source that the context holds, some at a time."""
        if number in self._spools:
            spool = self._spools[number]
            found.count, found.dropped = found.count + spool.read, found.dropped + spool.dropped
            yield from spool.chunks()
            return
        again = self._labels is not None or (self._config.ref_logps and not files.is_run(self.names[number]))
        dropped: list[Dropped] = []
        count = 0
        with Spool(self._row_type, self._folder) if again else nullcontext() as spool:
            for chunk in self._read(self.names[number], dropped):
                count += len(chunk)
                fitting = lengths.fitting(chunk, self._context, dropped)
                if spool:
                    spool.add(fitting)
                yield fitting
        found.count, found.dropped = found.count + count, found.dropped + dropped
        if spool:
            spool.read, spool.dropped = count, dropped
            self._spools[number] = spool
            if self._labels is not None:
                self._labels += spool.labels

    def _read(self, name: str, dropped: list[Dropped]) -> Iterator[list[Stored]]:
        if files.is_run(name) or self._chat is None or self.kind == "groups":
            for part in store.part_names(Path(name), store.read_manifest(Path(name)), self.kind):
                table = store.read_file(Path(name), store.read_manifest(Path(name)), part, self._row_type)
                for start in range(0, table.num_rows, _CHUNK):
                    yield list[Stored](from_table(self._row_type, table.slice(start, _CHUNK)))
            return
        read = tokenised.read_pairs if self.kind == "pairs" else tokenised.read_labels
        limits = lengths.limits(self._config, self._context)
        rows = read(name, self._chat, limits, files.renames(self._config.column), dropped)
        yield from _chunks(cast("Iterator[Stored]", rows))

    def _write(
        self, rows: Sequence[Stored], number: int, writer: Writer, found: Read, values: Mapping[str, RefLogps]
    ) -> None:
        for row in rows:
            check_ids(row, f"row {key_of(row)}")
        filled = [_with_values(row, values) for row in rows]
        for name, names in found.names.items():
            names |= {value for row in filled if (value := getattr(row, name)) is not None}
        if filled:
            writer.add(Batch(encode([replace(row, source=number) for row in _train_rows(filled)])))

    def _write_columns(self, number: int, writer: Writer, found: Read) -> None:
        """As `_write` does with the rows of a run of pairs or labels, without a Python object for a token."""
        run, row_type = Path(self.names[number]), cast("type[Pair] | type[Label]", self._row_type)
        manifest = store.read_manifest(run)
        for part in store.part_names(run, manifest, self.kind):
            table = store.read_file(run, manifest, part, row_type, columns.columns(row_type))
            found.count += table.num_rows
            for rows in table.combine_chunks().to_batches(max_chunksize=_BATCH):
                batch, names = columns.encode_columns(row_type, rows, number, self._context, found.dropped)
                for name, of_rows in names.items():
                    found.names[name] |= of_rows
                found.kept += batch.size
                if batch.size:
                    writer.add(batch)

    def _read_bank(self, found: Read) -> None:
        bank = self._bank if found.count else []
        if self._labels:
            self._bank = bank = kl_bank(self._labels, self._config.kl_bank_size, self._config.seed)
            self._labels = None
        found.bank = lengths.within(bank, self._context, found.dropped)


def write(
    folder: Path,
    training: Sources,
    held_out: Sources,
    sft: Callable[[list[Dropped]], Iterable[Sequence[TrainRow]]],
    values: Mapping[str, RefLogps],
) -> Facts:
    """Write the rows to train on and then those to evaluate on, their banks alike, and the rows that `sft` reads, whose
    faulty ones go to the list that it gets.

    Raises DataError where rows to evaluate on are asked for and none is there; other errors as `Sources.write`.
    """
    with Writer(folder / "rows.arrow") as rows, Writer(folder / "bank.arrow") as bank:
        found = training.write(rows, bank, values)
        facts = {"training": rows.count, "bank": bank.count}
        if held_out.names and found.kept:
            others = held_out.write(rows, bank, values)
            if not others.kept:
                reasons = why_dropped(others.dropped)
                raise DataError(
                    f"no row of {', '.join(held_out.names)} can be evaluated on: {reasons}", "check the file"
                )
            found.dropped += others.dropped
            for name, names in others.names.items():
                found.names[name] |= names
    with Writer(folder / "sft.arrow") as writer:
        for chunk in sft(found.dropped) if found.kept else ():
            writer.add(Batch(encode(chunk)))
    named = {name: sorted(names) for name, names in found.names.items()}
    return {**facts, **named, "dropped": [[row.id, row.reason, row.detail] for row in found.dropped]}


def read_sft(
    config: TrainConfig, chat: Chat | None, context: int | None, dropped: list[Dropped]
) -> Iterator[Sequence[TrainRow]]:
    """The rows to imitate, some at a time; faulty ones go to `dropped`. Raises UsageError for a run, DataError when no
    row is left."""
    limits, renames = lengths.limits(config, context), files.renames(config.sft_column)
    before, kept = len(dropped), 0
    for source in config.sft:
        if files.is_run(source):
            raise UsageError(
                f"--sft {source} is a run: its completions are samples of a policy, good ones and bad ones",
                "give files of answers to imitate; for chosen completions of pairs add --loss-type nll",
            )
        assert chat is not None
        for chunk in _chunks(tokenised.read_completions(source, chat, limits, renames, dropped)):
            kept += len(chunk)
            yield examples.from_completions(chunk)
    if config.sft and not kept:
        reasons = why_dropped(dropped[before:])
        raise DataError(f"no row of {', '.join(config.sft)} can be imitated: {reasons}", "check the file")


def _bank_of(run: Path) -> list[KlBank]:
    there = files.is_run(run) and (run / "kl_bank").is_dir()
    return from_table(KlBank, store.read_dataset(run, "kl_bank", KlBank)) if there else []


def _train_rows(rows: Sequence[Stored]) -> Sequence[TrainPair | TrainLabel | TrainGroup]:
    """Rows of a dataset, all of one type, as training takes them."""
    if isinstance(rows[0], Pair):
        return examples.from_pairs(cast("Sequence[Pair]", rows))
    if isinstance(rows[0], Label):
        return examples.from_labels(cast("Sequence[Label]", rows))
    if isinstance(rows[0], KlBank):
        return examples.from_bank(cast("Sequence[KlBank]", rows))
    return examples.from_groups(cast("Sequence[RankedGroup]", rows))


def _with_values(row: Stored, values: Mapping[str, RefLogps]) -> Stored:
    known = all(key in values for key, *_ in completions_of(row))
    return with_ref_logps(row, values) if known else row


def _chunks(rows: Iterable[T]) -> Iterator[list[T]]:
    source = iter(rows)
    while chunk := list(islice(source, _CHUNK)):
        yield chunk
