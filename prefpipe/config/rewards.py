"""Settings of rewards: a class per kind, for a table `[reward_settings.NAME]` with that `kind`.

Each setting has a default, so that the name of a kind alone is a reward: `--rewards length`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from prefpipe.config import secrets
from prefpipe.config.base import ADDED, PATH, RUNTIME, Config
from prefpipe.config.judge import Dtype, GpuShare, Judge

Unit = Literal["words", "characters", "tokens"]
TimeoutSeconds = Annotated[float, Field(gt=0, description="Seconds for one completion; then its status is timeout.")]
SpecialTokens = Annotated[
    Literal["drop", "escape", "allow"],
    Field(
        description="Text that spells control tokens: drop the row (with its reason), escape (tokenise it as plain "
        "text), or allow it to act as control tokens."
    ),
]
NumWorkers = Annotated[int, RUNTIME, Field(ge=0, description="Processes that check at once; 0 for one per core.")]


class ShortSentence(Config):
    """How far an answer is one new sentence of 5 to 10 words about the topic."""

    kind: Literal["short_sentence"] = "short_sentence"


class Length(Config):
    """1 inside a window of lengths, falling towards 0 outside."""

    kind: Literal["length"] = "length"
    unit: Unit = "words"
    """What is counted: words (by white space), characters, or the sampled tokens."""
    min: Annotated[int, Field(ge=0)] = 1
    """Shortest length with reward 1."""
    max: Annotated[int, Field(ge=1)] = 200
    """Longest length with reward 1."""

    @model_validator(mode="after")
    def _is_a_window(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min = {self.min} is more than max = {self.max}")
        return self


class Regex(Config):
    """1 when a pattern is found, or when it is not."""

    kind: Literal["regex"] = "regex"
    pattern: str = r"[.!?]\s*$"
    """Regular expression, searched anywhere in the completion; anchor it with ^ and $."""
    match: bool = True
    """true: 1 when the pattern is found; false: 1 when it is not."""
    timeout_seconds: TimeoutSeconds = 1.0


class JsonSchema(Config):
    """1 for JSON that a schema accepts."""

    kind: Literal["json_schema"] = "json_schema"
    schema_file: Annotated[str, PATH] = ""
    """A JSON Schema (of the draft in its `$schema`, else 2020-12); empty accepts any JSON."""


class Keyword(Config):
    """The share of conditions on words that hold."""

    kind: Literal["keyword"] = "keyword"
    all: tuple[str, ...] = ()
    """Words or phrases that must each be in the completion. Without any words the prompt's `answer` must be in it."""
    any: tuple[str, ...] = ()
    """Words or phrases of which at least one must be in the completion."""
    none: tuple[str, ...] = ()
    """Words or phrases that must not be in the completion."""
    ignore_case: bool = True
    """Whether capital and small letters are equal."""


class Language(Config):
    """The probability that a completion is in a language."""

    kind: Literal["language"] = "language"
    language: Annotated[str, Field(pattern="^[a-z]{2,3}$")] = "en"
    """ISO 639 code."""


class Repetition(Config):
    """The share of distinct n-grams of words."""

    kind: Literal["repetition"] = "repetition"
    n: Annotated[int, Field(ge=1)] = 3
    """Words in an n-gram."""


class Refusal(Config):
    """1 for an answer, 0 for a refusal (or the other way round)."""

    kind: Literal["refusal"] = "refusal"
    prefer: Literal["answer", "refusal"] = "answer"
    """What has reward 1: an answer, or (for prompts that must be refused) a refusal."""
    phrases: tuple[str, ...] = ()
    """Further phrases of refusal, beside the English ones (docs/rewards.md)."""


class ExactMatch(Config):
    """1 when a completion, or the part of it that a pattern finds, equals the prompt's `answer`."""

    kind: Literal["exact_match"] = "exact_match"
    pattern: str = ""
    """Regular expression whose last match (or its group 1) is compared; empty compares the whole text."""
    ignore_case: bool = True
    """Whether capital and small letters are equal."""
    ignore_punctuation: bool = True
    """Whether punctuation at both ends is removed before comparing."""
    timeout_seconds: TimeoutSeconds = 1.0


class Math(Config):
    """1 when the last expression of a completion equals the prompt's `answer` as mathematics."""

    kind: Literal["math"] = "math"
    precision: Annotated[int, Field(ge=0)] = 6
    """Decimal places in which numbers must agree."""
    timeout_seconds: TimeoutSeconds = 10.0
    num_workers: NumWorkers = 0


class ReasoningGym(Config):
    """The score of reasoning-gym's checker for the answer to one of its tasks."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    timeout_seconds: TimeoutSeconds = 10.0
    num_workers: NumWorkers = 0


class Code(Config):
    """The share of tests that a Python program passes."""

    kind: Literal["code"] = "code"
    partial: bool = False
    """With input and output cases: the reward is the share of cases that the program passes; off, 1 for every case."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 10.0
    """CPU seconds of one run of the program, rounded up; the wall clock ends it at twice that and two seconds."""
    memory_mib: Annotated[int, Field(ge=32)] = 512
    """Address space of the program, in MiB."""
    isolation: Literal["strict", "limits"] = "strict"
    """strict: no network, no new processes, no files outside a temporary folder; needs Linux with seccomp and Landlock,
    and the run stops without them. limits: only CPU, memory, file size and wall clock; the program can do what you
    can do."""
    num_workers: NumWorkers = 0


class RewardModel(Config):
    """The logit of a sequence-classification model."""

    kind: Literal["reward_model"] = "reward_model"
    model: Annotated[str, PATH] = ""
    """Reward model: a directory or a hub id."""
    chat_template: Annotated[str, PATH] = "model"
    """'model' for the chat template of the reward model, or a Jinja file."""
    special_tokens_in_prompts: Annotated[SpecialTokens, ADDED] = "drop"
    template_changes: Annotated[Literal["drop", "allow"], ADDED] = "drop"
    """A conversation whose text the chat template of the reward model leaves out: no reward (drop), or allow."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What runs it: transformers (any such model), or vLLM's pooling (faster on a GPU, for the models it knows)."""
    label: str = ""
    """Name or number of the logit that is the reward; a model with a single logit needs none."""
    dtype: Dtype = "auto"
    max_length: Annotated[int, Field(ge=1)] = 4096
    """Longest conversation, in tokens of prompt and completion. A longer one is not cut, it has no reward."""
    tokens_per_batch: Annotated[int, RUNTIME, Field(ge=1)] = 16384
    """transformers: tokens in one forward pass, with padding; vLLM batches by itself."""
    gpu_memory_utilization: GpuShare = 0.85


class Function(Config):
    """What your function returns for each completion, within a time limit."""

    kind: Literal["function"] = "function"
    function: str = ""
    """`module:function` with the signature of TRL's reward functions, called with one completion at a time."""
    timeout_seconds: TimeoutSeconds = 10.0
    num_workers: NumWorkers = 0


Settings = (
    ShortSentence
    | Length
    | Regex
    | JsonSchema
    | Keyword
    | Language
    | Repetition
    | Refusal
    | ExactMatch
    | Math
    | ReasoningGym
    | Code
    | RewardModel
    | Judge
    | Function
)
KINDS: dict[str, type[BaseModel]] = {cls.model_fields["kind"].default: cls for cls in get_args(Settings)}


def _from_json(value: object) -> object:
    """The tables of a recipe as they are; the JSON object of the flag, parsed."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error


def _check_tables(tables: dict[str, Settings]) -> dict[str, Settings]:
    for name, settings in tables.items():
        if name in KINDS and name != settings.kind:
            raise ValueError(f'a table named \'{name}\' must have kind = "{name}", not "{settings.kind}"')
        if held := secrets.setting_with_key(settings):
            raise ValueError(f"table '{name}': {held} holds what looks like a key: name its variable in api_key_env")
    return tables


RewardSettings = Annotated[
    dict[
        Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9_-]*$")], Annotated[Settings, Field(discriminator="kind")]
    ],
    PATH,  # not in the fingerprint: rewards.identity adds the settings of the rewards that the run names
    BeforeValidator(_from_json),
    AfterValidator(_check_tables),
    Field(
        description="Settings of rewards by name: tables [reward_settings.NAME] in a recipe (instead of this line), "
        "a JSON object on the command line."
    ),
]


def settings_of(name: str, tables: Mapping[str, Settings]) -> Any:
    """The settings of a reward: its table, or the defaults of its kind. Raises KeyError for a user's function."""
    return tables[name] if name in tables else KINDS[name]()


def check_gpu_memory(share: float | None, names: Sequence[str], tables: Mapping[str, Settings]) -> None:
    """Raise ValueError when the engines of a run would together take more than the memory of one GPU.

    vLLM reserves its share when it starts, and the engine of a reward starts only after the first shard is sampled,
    which is too late for the error. `share` is that of the command's engine, None when it is not vLLM.
    """
    shares = {} if share is None else {"the model": share}
    for name in names:
        settings = tables.get(name)
        if isinstance(settings, Judge | RewardModel) and settings.engine == "vllm":
            shares[f"reward {name}"] = settings.gpu_memory_utilization
    total = round(sum(shares.values()), 6)
    if total > 1:
        parts = ", ".join(f"{value:g} for {name}" for name, value in shares.items())
        raise ValueError(
            f"vLLM would take {total:g} of a GPU's memory ({parts}): lower gpu_memory_utilization, here and in "
            "[reward_settings.NAME], to at most 1 together (on a CPU too, so that a recipe runs on both), or rate in "
            "another run: prefpipe score --reference none"
        )
