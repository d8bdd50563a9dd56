"""Row types, one frozen dataclass per dataset: the annotations decide the Arrow schema and which columns may be null. A
column is declared here and nowhere else. docs/datasets.md lists the columns."""

import dataclasses
from functools import cache
from typing import Annotated, Any, NotRequired, TypedDict, TypeVar, get_args, get_origin, get_type_hints

import pyarrow as pa


class Message(TypedDict):
    """One turn of a conversation. `extra` is JSON of what a chat template may read beside its text: tool_calls,
    reasoning_content, name; a turn of plain text has none."""

    role: str
    content: str
    extra: NotRequired[str]


Float32 = Annotated[float, pa.float32()]
Int32 = Annotated[int, pa.int32()]
Messages = list[Message]
TokenIds = list[Int32]
TokenLogps = list[Float32]
LossMask = list[bool]

VERSION = 1  # of all row types together: CONTRIBUTING.md says when to raise it
DATASET_KEY, VERSION_KEY = "prefpipe.dataset", "prefpipe.version"  # in the metadata of every file
PLAIN_MESSAGE = pa.struct([pa.field(name, pa.string(), nullable=False) for name in ("role", "content")])
MESSAGE = pa.struct([*PLAIN_MESSAGE, pa.field("extra", pa.string())])
_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_(), Message: MESSAGE}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a completion answers. Key: prompt_id = content hash of messages, answer and template_inputs, which is JSON
    of what else the chat template gets: tools, documents, chat_template_kwargs."""

    prompt_id: str
    messages: Messages
    answer: str | None
    split: str
    source: str
    meta: str
    template_inputs: str | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled answer, as the exact token ids; text is for people. `token_ids` holds the EOS when it was sampled.
    `messages` are the turns of an answer from a file that say more than text, such as tool calls. `thinking` is the
    reasoning in front of `text`, with its marks, and `thinking_tokens` the number of its tokens; of several turns it is
    all in front of the last answer. `loss_mask` says which tokens are scored; null: every one."""

    completion_id: str
    prompt_id: str
    sample_index: Int32
    text: str
    prompt_token_ids: TokenIds
    token_ids: TokenIds
    finish_reason: str
    policy: str
    ids_digest: str
    messages: Messages | None = None
    thinking: str | None = None
    thinking_tokens: Int32 | None = None
    loss_mask: LossMask | None = None


@dataclasses.dataclass(frozen=True)
class RefLogps:
    """Raw reference log-probs (nats, temperature 1) of a completion's scored tokens, and their float32 sum."""

    completion_id: str
    reference: str
    scorer: str
    ids_digest: str
    token_logps: TokenLogps
    ref_logps: Float32
    num_tokens: Int32


@dataclasses.dataclass(frozen=True)
class Reward:
    """One reward of one completion; long form, so rewards add up. status: ok, wrong, crash, timeout, unparsable."""

    completion_id: str
    name: str
    reward: float | None
    status: str
    detail: str | None


@dataclasses.dataclass(frozen=True)
class Pair:
    """A chosen and a rejected completion of one prompt, ready for `prefpipe train` and, by column names, for TRL."""

    pair_id: str
    prompt_id: str
    chosen_completion_id: str
    rejected_completion_id: str
    prompt: Messages
    chosen: Messages
    rejected: Messages
    prompt_token_ids: TokenIds
    chosen_token_ids: TokenIds
    rejected_token_ids: TokenIds
    chosen_ids_digest: str
    rejected_ids_digest: str
    chosen_reward: float | None
    rejected_reward: float | None
    reward_gap: float | None
    preference_prob: float | None
    chosen_finish_reason: str
    rejected_finish_reason: str
    weight: float
    ref_chosen_logps: Float32 | None
    ref_rejected_logps: Float32 | None
    ref_chosen_token_logps: TokenLogps | None
    ref_rejected_token_logps: TokenLogps | None
    reference: str | None
    scorer: str | None
    template_inputs: str | None = None
    chosen_loss_mask: LossMask | None = None
    rejected_loss_mask: LossMask | None = None


@dataclasses.dataclass(frozen=True)
class Label:
    """A completion marked desirable (true) or undesirable (false), for KTO and other unpaired losses."""

    completion_id: str
    prompt_id: str
    prompt: Messages
    completion: Messages
    label: bool
    prompt_token_ids: TokenIds
    token_ids: TokenIds
    ids_digest: str
    finish_reason: str
    reward: float | None
    weight: float
    ref_logps: Float32 | None
    ref_token_logps: TokenLogps | None
    reference: str | None
    scorer: str | None
    template_inputs: str | None = None
    loss_mask: LossMask | None = None


@dataclasses.dataclass(frozen=True)
class KlBank:
    """A prompt with the completion of another prompt: KTO's z0 is the mean log-ratio of such rows (2402.01306, eq. 8).
    Key: bank_id = hash(prompt ids, completion ids). Fixed when labels are built, so that its reference is cacheable."""

    bank_id: str
    prompt_id: str
    completion_id: str
    prompt_token_ids: TokenIds
    token_ids: TokenIds
    ids_digest: str
    ref_logps: Float32 | None
    ref_token_logps: TokenLogps | None
    reference: str | None
    scorer: str | None
    loss_mask: LossMask | None = None


@dataclasses.dataclass(frozen=True)
class RankedGroup:
    """The completions of one prompt from best to worst; every list has one entry per completion, in that order."""

    prompt_id: str
    prompt: Messages
    prompt_token_ids: TokenIds
    completion_ids: list[str]
    completions: list[Messages]
    token_ids: list[TokenIds]
    ids_digests: list[str]
    rewards: list[float]
    finish_reasons: list[str]
    weight: float
    ref_logps: list[Float32] | None
    ref_token_logps: list[TokenLogps] | None
    reference: str | None
    scorer: str | None
    template_inputs: str | None = None
    loss_masks: list[LossMask] | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One rated answer of a policy on a held-out prompt. decoding: greedy or sampled. Others as in Completion."""

    completion_id: str
    prompt_id: str
    sample_index: Int32
    round: Int32
    decoding: str
    messages: Messages
    text: str
    token_ids: TokenIds
    finish_reason: str
    policy: str
    name: str
    reward: float | None
    status: str
    detail: str | None
    thinking: str | None = None
    token_logps: TokenLogps | None = None


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number of an evaluation with its 95 % interval. `of`: what it describes; `against`: the side compared with."""

    round: Int32
    policy: str
    of: str
    against: str | None
    decoding: str | None
    name: str
    value: float
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class Margin:
    """How much more than the reference the policy prefers the chosen side of a row: reward of chosen minus that of
    rejected, beta * h. After `step` steps if `held_out`, else as step number `step`, counted from 1, read it."""

    row_id: str
    source: Int32
    held_out: bool
    step: Int32
    margin: Float32


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A row that did not go on, and why. `id` is a prompt_id, completion_id or pair, or the place in an input file."""

    id: str
    reason: str
    detail: str


R = TypeVar("R")


@cache
def arrow_schema(row_type: type) -> pa.Schema:
    """The Arrow schema of a row type, with dataset name and version in its metadata."""
    hints = get_type_hints(row_type, include_extras=True)
    fields = [_field(f.name, hints[f.name]) for f in dataclasses.fields(row_type)]
    return pa.schema(fields, metadata={DATASET_KEY: row_type.__name__, VERSION_KEY: str(VERSION)})


def to_table(row_type: type[R], rows: list[R]) -> pa.Table:
    """Rows of a type as an Arrow table with the schema of that type."""
    schema = arrow_schema(row_type)
    columns = [pa.array([getattr(row, field.name) for row in rows], type=field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def from_table(row_type: type[R], table: pa.Table) -> list[R]:
    """The rows of an Arrow table; its columns must be the fields of the type."""
    rows = table.to_pylist()
    for field in arrow_schema(row_type):
        if field.name in table.column_names and _holds_messages(field.type):
            for row in rows:
                _drop_null_extra(row[field.name])
    return [row_type(**row) for row in rows]


def _holds_messages(data_type: pa.DataType) -> bool:
    return data_type == MESSAGE or (pa.types.is_list(data_type) and _holds_messages(data_type.value_type))


def _drop_null_extra(value: Any) -> None:
    """Take `extra` out of messages that have none, in lists of any depth: equal messages are equal dicts."""
    for entry in value or ():
        if isinstance(entry, list):
            _drop_null_extra(entry)
        elif entry["extra"] is None:
            del entry["extra"]


def _field(name: str, hint: Any) -> pa.Field:
    nullable = type(None) in get_args(hint)
    if nullable:
        hint = next(a for a in get_args(hint) if a is not type(None))
    return pa.field(name, _data_type(hint), nullable=nullable)


def _data_type(hint: Any) -> pa.DataType:
    if get_origin(hint) is list:
        return pa.list_(pa.field("element", _data_type(get_args(hint)[0]), nullable=False))
    return get_args(hint)[1] if get_origin(hint) is Annotated else _TYPES[hint]
