"""What a training run reads: pairs, labels or ranked groups of runs and files, checked. No model is loaded here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from prefpipe import log
from prefpipe.config.losses import Kind, Objective, loss_of
from prefpipe.config.train import UNAVAILABLE, TrainConfig
from prefpipe.errors import DataError, UsageError
from prefpipe.inputs import files
from prefpipe.models import vocabulary
from prefpipe.models.chat import Chat, load_chat
from prefpipe.models.notices import check_ends
from prefpipe.models.policy import Policy, resolve
from prefpipe.rows import check_ids, completions_of, key_of, one_reference, with_ref_logps
from prefpipe.runs import store
from prefpipe.schemas import Dropped, RefLogps
from prefpipe.stages.train import examples, lengths, mixing, sources, user_losses
from prefpipe.stages.train.evaluation import split_by_prompt
from prefpipe.stages.train.examples import TrainLabel, TrainPair, TrainRow, has_ref_logps
from prefpipe.stages.train.reference.identity import Named, Reference, settle_reference
from prefpipe.stages.train.reference.values import read_ref_logps
from prefpipe.stages.train.sources import Read, Stored

_HOW = {
    "pairs": "pass --pairs DIR (a run of prefpipe build-pairs) or a .jsonl file with prompt, chosen, rejected",
    "labels": "pass --labels DIR (a run of prefpipe build-pairs) or a .jsonl file with prompt, completion, label",
    "groups": "pass --groups DIR (a run of prefpipe build-pairs with ranked groups)",
}
_EVAL = {"pairs": "eval_pairs", "labels": "eval_labels", "groups": "eval_groups"}
_COLUMNS = ("preference_prob", "reward_gap")  # what a loss may need that a pair may lack
T = TypeVar("T", bound=Stored)


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on, where it starts, and what identifies both."""

    # What the rows are: pairs, labels or groups.
    kind: Kind
    # The rows to train on.
    rows: list[TrainRow]
    # Mismatched rows for the reference point of KTO: those of the rows to train on, then those of --eval-labels.
    bank: list[TrainLabel]
    # The ledger of input rows that could not be read, or that the model cannot take.
    dropped: list[Dropped]
    # The initial policy.
    policy: Policy
    # Whose log-probs the rows hold or are to get; None where no loss reads them.
    reference: Reference | None
    # The scorers (engine, version, dtype) that computed the reference log-probs of the rows.
    scorers: set[str]
    # What the run is made from, by content: a run directory is resumed only with the same.
    inputs: dict[str, str]
    # The rows to evaluate on.
    eval_rows: list[TrainRow] = field(default_factory=list[TrainRow])
    # Whether every completion was sampled from the reference.
    on_reference: bool = False
    # How many rows at the end of the bank are those of --eval-labels.
    num_eval_bank: int = 0
    # The rows to imitate, beside the others; nothing reads reference log-probs of them.
    sft: list[TrainLabel] = field(default_factory=list[TrainLabel])

    @property
    def all_rows(self) -> list[TrainRow]:
        """Every row whose completions need reference log-probs."""
        return [*self.rows, *self.eval_rows, *self.bank]

    @property
    def computed_rows(self) -> list[TrainRow]:
        """Every row that the policy computes."""
        return [*self.all_rows, *self.sft]

    @property
    def training_bank(self) -> list[TrainLabel]:
        """The mismatched rows that give a step its z0."""
        return self.bank[: len(self.bank) - self.num_eval_bank]

    @property
    def eval_bank(self) -> list[TrainLabel]:
        """The mismatched rows that give an evaluation its z0. With eval_split the rows to evaluate on come from the
        data that is trained on, and share its bank."""
        return self.bank[len(self.bank) - self.num_eval_bank :] if self.num_eval_bank else self.bank


def prepare(config: TrainConfig) -> TrainingData:
    """Read and check everything that training needs, without loading a model."""
    kind = kind_of(config)
    named_sources = {name: list[str](getattr(config, name)) for name in (kind, _EVAL[kind], "sft")}
    given, held_out, _ = named_sources.values()
    inputs = {f"{name}.{i}": files.digest(s) for name in named_sources for i, s in enumerate(named_sources[name])}
    inputs |= user_losses.inputs(config.objective)
    policy = resolve(config.model, config.adapter)
    runs = [Path(s) for s in (*given, *held_out) if files.is_run(s)]
    vocabulary.check(runs, policy.directory)
    chat = _chat(policy, config) if config.sft or len(runs) < len(given) + len(held_out) else None
    needs_reference = config.objective.needs("reference")
    named = _named_reference(config, needs_reference=needs_reference)
    context = lengths.context_of([policy, *([named] if isinstance(named, Policy) else [])])
    read = sources.read(given, kind, chat, config, context)
    num_training, num_bank = len(read.rows), len(read.bank)
    if not read.rows:
        return TrainingData(kind, [], [], read.dropped, policy, None, set(), inputs | {"policy": policy.id})
    if held_out:
        sources.add_held_out(read, held_out, sources.read(held_out, kind, chat, config, context))
    sft = sources.read_sft(config, chat, lengths.context_of([policy]), read.dropped)
    lengths.warn(read.dropped, context)
    for row in (*read.rows, *read.bank):
        check_ids(row, f"row {key_of(row)}")
    if config.ref_logps:
        inputs |= {f"ref_logps.{i}": store.input_digest(Path(run)) for i, run in enumerate(config.ref_logps)}
        _take_values(read, config, needs_reference=needs_reference)
    inputs |= {"policy": policy.id, **(chat.digests if chat else {})}
    rows = sources.train_rows(kind, read)
    _check_columns(config.objective, rows)
    user_losses.check(config.objective, rows)
    bank = examples.from_bank(read.bank)
    reference = _reference((*read.rows, *read.bank), [*rows, *bank], policy, named) if needs_reference else None
    inputs |= {"reference": _recorded(reference)} if reference and named else {}
    training, eval_rows = _parted(rows, num_training, kind, config)
    _check_order(config, training)
    return TrainingData(
        kind=kind,
        rows=training,
        bank=bank,
        dropped=read.dropped,
        policy=policy,
        reference=reference,
        scorers={row.scorer for row in (*read.rows, *read.bank) if row.scorer is not None},
        inputs=inputs,
        eval_rows=eval_rows,
        on_reference=reference is not None and _sampled_by(given) == {reference.id},
        num_eval_bank=len(bank) - num_bank,
        sft=sft,
    )


def for_settings(data: TrainingData, config: TrainConfig) -> TrainingData:
    """The same rows for a run with other settings, which must leave the rows and the reference alone. `data` is as
    `prepare` made it, with a reference if `config` needs one. Raises what `prepare` would raise for these settings."""
    kind_of(config)
    _check_columns(config.objective, [*data.rows, *data.eval_rows])
    _check_order(config, data.rows)
    if config.objective.needs("reference"):
        return data
    _named_reference(config, needs_reference=False)
    _refuse_unread_values(config)
    inputs = {name: digest for name, digest in data.inputs.items() if name != "reference"}
    return replace(data, reference=None, on_reference=False, inputs=inputs)


def _chat(policy: Policy, config: TrainConfig) -> Chat:
    """How the policy reads the rows of files; the log says when its answers have no end."""
    chat = load_chat(policy.directory, config.chat_template, template_kwargs=config.chat_template_kwargs)
    check_ends(chat)
    return chat


def _sampled_by(sources: Sequence[str]) -> set[str | None]:
    """The policies that the completions were sampled from, as the runs of build-pairs record them; None stands for a
    file, and for a run that records none."""
    policies: set[str | None] = set()
    for source in sources:
        identity = store.read_manifest(Path(source))["identity"] if files.is_run(source) else {}
        policies |= set(identity.get("policies") or [None])
    return policies


def kind_of(config: TrainConfig) -> Kind:
    """The rows that the losses train on. Raises UsageError when the settings name none, or rows of another kind."""
    kind = config.objective.kind
    given = [name for name in _HOW if getattr(config, name)]
    if not given:
        raise UsageError(f"no {kind} given: loss {config.loss_type[0]} trains on them", _HOW[kind])
    if given != [kind]:
        others = ", ".join(f"--{name}" for name in given if name != kind)
        raise UsageError(f"loss {config.loss_type[0]} trains on {kind}, but {others} is given", _HOW[kind])
    wrong = [f"--eval-{name}" for name, field_ in _EVAL.items() if name != kind and getattr(config, field_)]
    if wrong:
        raise UsageError(
            f"loss {config.loss_type[0]} is evaluated on {kind}, but {', '.join(wrong)} is given",
            f"give them as --eval-{kind}, or use --eval-split",
        )
    if kind == "labels" and config.group_by_prompt:
        raise UsageError("group_by_prompt = true: labels are drawn class by class", "leave it out for labels")
    return kind


def _parted(
    rows: list[TrainRow], num_training: int, kind: Kind, config: TrainConfig
) -> tuple[list[TrainRow], list[TrainRow]]:
    """Rows to train on and rows to evaluate on."""
    if config.eval_split:
        return split_by_prompt(rows, config.eval_split, config.seed)
    training, eval_rows = rows[:num_training], rows[num_training:]
    shared = {row.prompt_ids for row in training} & {row.prompt_ids for row in eval_rows}
    if shared:
        log.warn(f"{len(shared)} prompts of --eval-{kind} are trained on too: their metrics will look too good")
    return training, eval_rows


def _take_values(read: Read, config: TrainConfig, *, needs_reference: bool) -> None:
    """Give every row whose completions are all in the runs of --ref-logps the log-probs of these runs."""
    if not needs_reference:
        _refuse_unread_values(config)
    digests = {key: digest for row in (*read.rows, *read.bank) for key, *_, digest in completions_of(row)}
    values = read_ref_logps([Path(run) for run in config.ref_logps], digests)
    if not values:
        raise DataError(
            f"none of {len(digests)} completions has log-probs in {', '.join(config.ref_logps)}",
            "score these rows: prefpipe score --inputs DIR --out NEW",
        )
    read.rows = [_with_values(row, values) for row in read.rows]
    read.bank = [_with_values(row, values) for row in read.bank]


def _refuse_unread_values(config: TrainConfig) -> None:
    if config.ref_logps:
        raise UsageError(f"--ref-logps is read by none of {', '.join(config.loss_type)}", "leave it out")


def _with_values(row: T, values: Mapping[str, RefLogps]) -> T:
    known = all(key in values for key, *_ in completions_of(row))
    return with_ref_logps(row, values) if known else row


def _check_columns(objective: Objective, rows: Sequence[TrainRow]) -> None:
    """Raise DataError when a loss reads a column that is null, or takes the logarithm of a value that has none."""
    pairs = [row for row in rows if isinstance(row, TrainPair)]
    for name in objective.names:
        for column in loss_of(name).needs:
            lacking = [row.pair_id for row in pairs if column in _COLUMNS and getattr(row, column) is None]
            if lacking:
                raise DataError(
                    f"loss {name} reads {column}, which {len(lacking)} of {len(pairs)} pairs lack (first {lacking[0]})",
                    "build pairs that have it, or choose another loss: see docs/losses.md",
                )
        for column, advice in loss_of(name).logarithm_of.items():
            low = [row.pair_id for row in pairs if not (getattr(row, column) or 0.0) > 0]
            if low:
                raise DataError(
                    f"loss {name} takes the logarithm of {column}, which is not above 0 in {len(low)} pairs (first "
                    f"{low[0]})",
                    advice,
                )


def _check_order(config: TrainConfig, rows: Sequence[TrainRow]) -> None:
    """Raise UsageError when rows are to be ordered by a reward_gap that they lack, or a source has no row to draw."""
    mixing.epoch_size(rows, config)
    lacking = [row.row_id for row in rows if isinstance(row, TrainPair) and row.reward_gap is None]
    if config.train_order == "hardness" and lacking:
        raise UsageError(
            f"train_order = hardness: {len(lacking)} of {len(rows)} pairs have no reward_gap (first {lacking[0]})",
            "train on pairs of prefpipe build-pairs, which have rewards, or leave --train-order out",
        )


def _named_reference(config: TrainConfig, *, needs_reference: bool) -> Named:
    """The reference that the settings name. None: the initial policy or its base, whichever the values are of."""
    if config.reference_model == "policy" and config.reference_adapter == "none":
        return None
    if not needs_reference:
        raise UsageError(f"a reference is read by none of {', '.join(config.loss_type)}", "leave --reference-model out")
    if config.reference_model == UNAVAILABLE:
        return UNAVAILABLE
    model = config.model if config.reference_model == "policy" else config.reference_model
    return resolve(model, config.reference_adapter)


def _reference(stored: Sequence[Stored], rows: Sequence[TrainRow], policy: Policy, named: Named) -> Reference:
    """The one reference of the rows. Raises DataError for rows of several, and as `settle_reference` does."""
    reference_id = one_reference(row.reference for row in stored)
    missing = sum(not has_ref_logps(row) for row in rows)
    lacking = f"{missing} of {len(rows)} rows" if missing else None
    return settle_reference(reference_id, lacking, policy, named)


def _recorded(reference: Reference) -> str:
    """A named reference as an input of the run: the trained weights depend on it, and a reader must see when its values
    were not checked."""
    return reference.id if reference.at_hand else f"{reference.id} (values not checked)"
