"""What a training run reads: pairs, labels or ranked groups of runs and files, checked. No model is loaded here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from prefpipe import clock, log
from prefpipe.config.base import dump
from prefpipe.config.losses import Kind
from prefpipe.config.train import UNAVAILABLE, TrainConfig
from prefpipe.errors import DataError, UsageError
from prefpipe.inputs import files
from prefpipe.models import vocabulary
from prefpipe.models.chat import Chat, load_chat
from prefpipe.models.notices import check_ends
from prefpipe.models.policy import Policy, resolve
from prefpipe.rows import one_reference
from prefpipe.runs import checkpoints, store
from prefpipe.runs.checkpoints import Source
from prefpipe.schemas import VERSION, Dropped, RefLogps
from prefpipe.stages.train import lengths, mapped, moments, row_checks, row_files, sources, user_losses
from prefpipe.stages.train.evaluation import split_by_prompt
from prefpipe.stages.train.examples import TrainLabel, TrainRow
from prefpipe.stages.train.record_batches import Batch
from prefpipe.stages.train.reference.identity import Named, Reference, settle_reference
from prefpipe.stages.train.reference.values import read_ref_logps
from prefpipe.stages.train.row_files import Facts
from prefpipe.stages.train.sources import Sources

_HOW = {
    "pairs": "pass --pairs DIR (a run of prefpipe build-pairs) or a .jsonl file with prompt, chosen, rejected",
    "labels": "pass --labels DIR (a run of prefpipe build-pairs) or a .jsonl file with prompt, completion, label",
    "groups": "pass --groups DIR (a run of prefpipe build-pairs with ranked groups)",
}
_EVAL = {"pairs": "eval_pairs", "labels": "eval_labels", "groups": "eval_groups"}


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on, where it starts, and what identifies both."""

    # What the rows are: pairs, labels or groups.
    kind: Kind
    # The rows to train on.
    rows: Sequence[TrainRow]
    # Mismatched rows for the reference point of KTO: those of the rows to train on, then those of --eval-labels.
    bank: Sequence[TrainLabel]
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
    eval_rows: Sequence[TrainRow] = ()
    # Whether every completion was sampled from the reference.
    on_reference: bool = False
    # How many rows at the end of the bank are those of --eval-labels.
    num_eval_bank: int = 0
    # The rows to imitate, beside the others; nothing reads reference log-probs of them.
    sft: Sequence[TrainLabel] = ()
    # The run whose optimizer this one goes on with; None for a new optimizer.
    optimizer: Source | None = None
    # Where the rows lie on this node.
    stored: Path | None = None

    @property
    def all_rows(self) -> Sequence[TrainRow]:
        """Every row whose completions need reference log-probs."""
        return mapped.chain(self.rows, self.eval_rows, self.bank)

    @property
    def computed_rows(self) -> Sequence[TrainRow]:
        """Every row that the policy computes."""
        return mapped.chain(self.all_rows, self.sft)

    @property
    def training_bank(self) -> Sequence[TrainLabel]:
        """The mismatched rows that give a step its z0."""
        return self.bank[: len(self.bank) - self.num_eval_bank]

    @property
    def eval_bank(self) -> Sequence[TrainLabel]:
        """The mismatched rows that give an evaluation its z0. With eval_split the rows to evaluate on come from the
        data that is trained on, and share its bank."""
        return self.bank[len(self.bank) - self.num_eval_bank :] if self.num_eval_bank else self.bank


def prepare(config: TrainConfig) -> TrainingData:
    """Read and check everything that training needs, without loading a model."""
    kind = kind_of(config)
    named_sources = {name: list[str](getattr(config, name)) for name in (kind, _EVAL[kind], "sft")}
    given, held_out, _ = named_sources.values()
    inputs = {f"{name}.{i}": files.digest(s) for name in named_sources for i, s in enumerate(named_sources[name])}
    optimizer = moments.source(config)
    inputs |= user_losses.inputs(config.objective)
    inputs |= {"optimizer_from": optimizer.manifest["digest"]} if optimizer else {}
    policy = resolve(config.model, config.adapter)
    runs = [Path(s) for s in (*given, *held_out) if files.is_run(s)]
    vocabulary.check(runs, policy.directory)
    chat = _chat(policy, config) if config.sft or len(runs) < len(given) + len(held_out) else None
    needs_reference = config.objective.needs("reference")
    named = _named_reference(config, needs_reference=needs_reference)
    context, own = (lengths.context_of(models) for models in (_models(policy, named), [policy]))
    if not needs_reference:
        _refuse_unread_values(config)
    inputs |= {f"ref_logps.{i}": store.input_digest(Path(run)) for i, run in enumerate(config.ref_logps)}
    inputs |= {"policy": policy.id, **(chat.digests if chat else {})}

    def write(folder: Path) -> Facts:
        training, others = (sources.Sources(names, kind, chat, config, context, folder) for names in (given, held_out))
        read_sft = partial(sources.read_sft, config, chat, own)
        return sources.write(folder, training, others, read_sft, _values(config, training, others))

    stored = row_files.place(_identity(config, inputs, named, [context, own], chat))
    found = row_files.opened(stored, write)
    rows, bank, sft = (found.rows[name] for name in ("rows", "bank", "sft"))
    dropped = [Dropped(*entry) for entry in found.facts["dropped"]]
    if not len(rows):
        return TrainingData(kind, [], [], dropped, policy, None, set(), inputs, stored=stored)
    lengths.warn(dropped, context)
    row_checks.columns(config.objective, rows)
    user_losses.check(config.objective, rows)
    everything = mapped.chain(rows, bank)
    reference = _reference(found.facts["reference"], everything, policy, named) if needs_reference else None
    inputs |= {"reference": _recorded(reference)} if reference and named else {}
    training, eval_rows = _parted(rows, found.facts["training"], kind, config)
    row_checks.order(config, training)
    return TrainingData(
        kind=kind,
        rows=training,
        bank=cast("Sequence[TrainLabel]", bank),
        dropped=dropped,
        policy=policy,
        reference=reference,
        scorers=set(found.facts["scorer"]),
        inputs=inputs,
        eval_rows=eval_rows,
        on_reference=reference is not None and _sampled_by(given) == {reference.id},
        num_eval_bank=len(bank) - found.facts["bank"],
        sft=cast("Sequence[TrainLabel]", sft),
        optimizer=optimizer,
        stored=stored,
    )


def for_settings(data: TrainingData, config: TrainConfig) -> TrainingData:
    """The same rows for a run with other settings, which must leave the rows and the reference alone. `data` is as
    `prepare` made it, with a reference if `config` needs one. Raises what `prepare` would raise for these settings."""
    kind_of(config)
    row_checks.columns(config.objective, mapped.chain(data.rows, data.eval_rows))
    row_checks.order(config, data.rows)
    if data.optimizer:
        checkpoints.check_kind(data.optimizer, config.optim)
    if config.objective.needs("reference"):
        return data
    _named_reference(config, needs_reference=False)
    _refuse_unread_values(config)
    inputs = {name: digest for name, digest in data.inputs.items() if name != "reference"}
    return replace(data, reference=None, on_reference=False, inputs=inputs)


def _models(policy: Policy, named: Named) -> list[Policy]:
    """The models that must take every row."""
    return [policy, *([named] if isinstance(named, Policy) else [])]


def _identity(
    config: TrainConfig, inputs: Mapping[str, str], named: Named, contexts: Sequence[int | None], chat: Chat | None
) -> dict[str, Any]:
    """All that the rows of a run depend on, apart from the code: more than is needed, rather than less. A template may
    print the date."""
    return {
        "schema": VERSION,
        "settings": dump(config),
        "inputs": dict(inputs),
        "reference": named.id if isinstance(named, Policy) else named,
        "contexts": list(contexts),
        "day": clock.local_time("%Y-%m-%d") if chat else None,
    }


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
    rows: Sequence[TrainRow], num_training: int, kind: Kind, config: TrainConfig
) -> tuple[Sequence[TrainRow], Sequence[TrainRow]]:
    """Rows to train on and rows to evaluate on."""
    if config.eval_split:
        return split_by_prompt(rows, config.eval_split, config.seed)
    training, eval_rows = rows[:num_training], rows[num_training:]
    prompts = mapped.prompt_numbers(rows) if len(eval_rows) else np.zeros(0, np.int32)
    shared = np.intersect1d(prompts[:num_training], prompts[num_training:])
    if shared.size:
        log.warn(f"{shared.size} prompts of --eval-{kind} are trained on too: their metrics will look too good")
    return training, eval_rows


def _values(config: TrainConfig, *read: Sources) -> Mapping[str, RefLogps]:
    """The log-probs in the runs of --ref-logps of the completions in the sources."""
    if not config.ref_logps:
        return {}
    digests = {key: digest for given in read for key, digest in given.digests().items()}
    values = read_ref_logps([Path(run) for run in config.ref_logps], digests)
    if digests and not values:
        raise DataError(
            f"none of {len(digests)} completions has log-probs in {', '.join(config.ref_logps)}",
            "score these rows: prefpipe score --inputs DIR --out NEW",
        )
    return values


def _refuse_unread_values(config: TrainConfig) -> None:
    if config.ref_logps:
        raise UsageError(f"--ref-logps is read by none of {', '.join(config.loss_type)}", "leave it out")


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


def _reference(names: Sequence[str], rows: Sequence[TrainRow], policy: Policy, named: Named) -> Reference:
    """The one reference of the rows, whose values are those of `names`. Raises DataError for several, and as
    `settle_reference` does."""
    reference_id = one_reference(names)
    missing = int((~mapped.column(rows, Batch.has_refs)).sum())
    lacking = f"{missing} of {len(rows)} rows" if missing else None
    return settle_reference(reference_id, lacking, policy, named)


def _recorded(reference: Reference) -> str:
    """A named reference as an input of the run: the trained weights depend on it, and a reader must see when its values
    were not checked."""
    return reference.id if reference.at_hand else f"{reference.id} (values not checked)"
