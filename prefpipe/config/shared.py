"""Field types that several commands share, so that one thing has one name, one check and one help text."""

import json
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo

from prefpipe.config import judge, rewards
from prefpipe.config.base import ADDED, PATH, REMOTE, RUNTIME, suggestion

DEFAULT_MODEL = "embedded:smollm2-135m-instruct"
REWARD_NAMES = tuple(rewards.KINDS)
IMPORTED_REWARD = "rating"  # the name of the ratings that came with foreign answers


def check_reward(name: str, info: ValidationInfo) -> str:
    """The name, of a kind, a table or a module:function. Raises ValueError for any other."""
    tables = info.data.get("reward_settings")  # None when the tables are refused: that error is enough
    if name == IMPORTED_REWARD:
        raise ValueError(f"'{name}' is the name of the ratings that `prefpipe score` imports: rename the table")
    if name in REWARD_NAMES or ":" in name or tables is None or name in tables:
        return name
    known = [*tables, *REWARD_NAMES]
    raise ValueError(
        f"no such reward{suggestion(name, known)}; rewards are {', '.join(known)}, "
        "a table [reward_settings.NAME] or your own 'module:function'"
    )


def _check_object(text: str) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError('not a JSON object such as {"enable_thinking": false}')
    return text


def _check_servers(base_urls: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    """The addresses. Raises ValueError for some without the engine that asks them, and the other way round."""
    engine = info.data.get("engine")  # None when it is refused: that error is enough
    if engine == "server" and not base_urls:
        raise ValueError('engine = "server" needs base_urls: the address of a server that holds this model')
    if base_urls and engine not in ("server", None):
        raise ValueError(f'base_urls is read by engine = "server", and engine is "{engine}"')
    return base_urls


Model = Annotated[str, PATH, Field(description="Model: a directory, a hub id, or embedded:smollm2-135m-instruct.")]
Adapter = Annotated[str, PATH, Field(description="Directory of a PEFT LoRA adapter on top of the model, or 'none'.")]
ChatTemplate = Annotated[
    str,
    PATH,
    Field(
        description="'model' for the model's chat template, the name of one of several, a Jinja file, or 'none' for "
        "plain text that ends with the end-of-sequence token."
    ),
]
TemplateDate = Annotated[
    str,
    RUNTIME,  # a template that prints the day makes it an input of the run
    Field(pattern=r"^(today|\d{4}-\d\d-\d\d)$", description="Day that a chat template prints: YYYY-MM-DD, or today."),
]
TemplateKwargs = Annotated[
    str,
    ADDED,
    AfterValidator(_check_object),
    Field(
        description='JSON of what the chat template gets beside the messages, such as {"enable_thinking": false}; the '
        "column chat_template_kwargs of a row goes before it."
    ),
]
TemplateChanges = Annotated[
    Literal["drop", "allow"],
    ADDED,
    Field(
        description="A row whose text the chat template leaves out, or whose prompt it renders otherwise when an "
        "answer follows: drop it, or allow both."
    ),
]
ThinkingMarks = Annotated[
    str,
    ADDED,
    Field(
        pattern=r"^(model|none|\S+ \S+)$",
        description="Marks around the reasoning in an answer: those of the model, none, or 'OPENING CLOSING'.",
    ),
]
RewardOn = Annotated[
    Literal["answer", "all"],
    ADDED,
    Field(description="What rewards see of a completion: the answer without its reasoning, or all of it."),
]
Column = Annotated[
    tuple[str, ...],
    ADDED,
    Field(description="NAME=COLUMN: a column of a foreign file under the name that docs/datasets.md gives it."),
]
Prompts = Annotated[
    str,
    PATH,
    REMOTE,
    Field(
        description="Prompts: a JSON, Parquet or Arrow file, a folder of them, or hf:OWNER/NAME, with `messages` or "
        "`prompt`."
    ),
]
Split = Annotated[str, Field(description="Value of the `split` column whose prompts to use; 'all' for every prompt.")]
Limit = Annotated[int, Field(ge=0, description="Use only the first so many prompts of the split; 0 for every prompt.")]
Engine = Annotated[
    Literal["vllm", "transformers", "server", "fake"],
    Field(
        description="What samples: vllm, transformers (slower, runs anywhere), server (vLLM or SGLang behind "
        "base_urls), fake (canned text, for tests)."
    ),
]
BaseUrls = Annotated[
    tuple[Annotated[str, AfterValidator(judge.address)], ...],
    RUNTIME,
    AfterValidator(_check_servers),  # a class declares engine before such a field
    Field(description="engine = server: addresses of servers that hold this model, such as http://localhost:8000."),
]
ApiKeyEnv = Annotated[
    str,
    RUNTIME,
    AfterValidator(judge.variable),
    Field(
        description="engine = server: environment variable that holds the key of the servers; if it is not set, no key "
        "is sent. The key is written nowhere."
    ),
]
TimeoutSeconds = Annotated[
    float,
    RUNTIME,
    Field(gt=0, description="engine = server: seconds for one completion, from the request to its last byte."),
]
Dtype = rewards.Dtype
RewardSettings = rewards.RewardSettings
NO_TABLES: dict[str, rewards.Settings] = {}
SpecialTokens = rewards.SpecialTokens
RewardName = Annotated[str, AfterValidator(check_reward)]  # a class declares reward_settings before such a field
REWARD_CHOICES = f"{', '.join(REWARD_NAMES)}, the name of a table [reward_settings.NAME], or your own 'module:function'"
Rewards = Annotated[tuple[RewardName, ...], Field(description=f"Rewards for every completion: {REWARD_CHOICES}.")]
Temperature = Annotated[float, Field(ge=0, le=2, description="Sampling temperature; 0 is greedy.")]
TopP = Annotated[float, Field(gt=0, le=1, description="Nucleus sampling: keep the smallest set with this mass.")]
MaxTokens = Annotated[int, Field(ge=1, description="Longest completion, in tokens.")]
MaxPromptTokens = Annotated[int, Field(ge=1, description="Longer prompts are dropped, with a line in dropped.parquet.")]
TopK = Annotated[int, Field(ge=0, description="Sample from the so many likeliest tokens; 0 for every token.")]
MinP = Annotated[
    float, Field(ge=0, le=1, description="Drop tokens less likely than this share of the likeliest one; 0 for none.")
]
StopTokenIds = Annotated[
    tuple[int, ...],
    Field(description="Token ids that end a completion, beside those of the model; they stay in the completion."),
]
Stop = Annotated[
    tuple[str, ...],
    Field(
        description="Texts of control tokens, such as <|im_end|>, that end a completion. Other stop strings are "
        "refused: they can end inside a token, and then the text and the token ids disagree."
    ),
]
PART = r"^[1-9]\d*/[1-9]\d*$"
Part = Annotated[
    str,
    Field(
        pattern=PART,
        description="I/N: only every N-th prompt, from the I-th. One process per GPU takes its own part and --out; "
        "`prefpipe gather` joins them.",
    ),
]
Workers = Annotated[
    Literal["auto"] | Annotated[int, Field(ge=1)],
    RUNTIME,
    Field(
        description="Engines that share the work, each in a process with its own GPUs; auto: one for each visible GPU "
        "(over tensor_parallel_size), without a GPU one for each core where memory and work allow."
    ),
]
CLUSTER = r"^(ray(://\S+)?)?$"
Cluster = Annotated[
    str,
    RUNTIME,
    Field(
        pattern=CLUSTER,
        description="Where the workers run: '' on this machine, ray on the Ray cluster of this machine, or "
        "ray://HOST:PORT (docs/guide/machines.md).",
    ),
]
TensorParallelSize = Annotated[int, RUNTIME, Field(ge=1, description="GPUs that share one model (vLLM only).")]
GpuMemoryUtilization = Annotated[
    float, RUNTIME, Field(gt=0, le=1, description="Share of a GPU's memory that vLLM takes.")
]
MaxTokensPerBatch = Annotated[
    int, RUNTIME, Field(ge=16, description="Token budget of one scoring pass: bounds the memory of its log-probs.")
]
Seed = Annotated[int, Field(ge=0, description="Seed of everything random in this run.")]
ShardRows = Annotated[
    int,
    RUNTIME,
    Field(ge=0, description="Prompts in one shard, the unit of commit and of resume; 0: about 64 shards of 16 to 512."),
]
MaxNumSeqs = Annotated[
    int, RUNTIME, Field(ge=1, description="Sequences that the engine works on at once; at each of several servers.")
]
KvCacheMib = Annotated[
    int, RUNTIME, Field(ge=16, description="Size of vLLM's KV cache on CPU, in MiB (a GPU takes its free memory).")
]
