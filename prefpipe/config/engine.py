"""Settings that commands with an engine share: `EngineConfig` of generate, score and evaluate, and `SamplingConfig` of
the two that sample."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, ValidationInfo

from prefpipe.config import judge, rewards, shared
from prefpipe.config.base import ADDED, PATH, REMOTE, RUNTIME, Config, Heading

_NO_TABLES: dict[str, rewards.Settings] = {}


def _check_servers(base_urls: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    """The addresses. Raises ValueError for engine = server without addresses, and for addresses with another engine."""
    engine = info.data.get("engine")  # None when it is refused: that error is enough
    if engine == "server" and not base_urls:
        raise ValueError('engine = "server" needs base_urls: the address of a server that holds this model')
    if base_urls and engine not in ("server", None):
        raise ValueError(f'base_urls is read by engine = "server", and engine is "{engine}"')
    return base_urls


class EngineConfig(Config):
    """Settings of a command that runs a policy in an engine.

    Classes that extend this one add settings under its headings, and mark their first field under each heading again.
    """

    HEADINGS: ClassVar[tuple[str, ...]] = (
        "Model and rows",
        "Reference log-probs",
        "Rewards",
        "Comparisons and guards",
        "Sampling",
        "Text to tokens",
        "Engine, number type and seed",
        "Machines and memory",
    )

    model: Annotated[shared.Model, Heading("Model and rows")] = shared.DEFAULT_MODEL
    adapter: shared.Adapter = "none"

    reward_settings: Annotated[rewards.RewardSettings, Heading("Rewards")] = _NO_TABLES
    reward_on: Annotated[Literal["answer", "all"], ADDED] = "answer"
    """What rewards see of a completion: the answer without its reasoning, or all of it."""

    chat_template: Annotated[shared.ChatTemplate, Heading("Text to tokens")] = "model"
    template_date: Annotated[str, RUNTIME, Field(pattern=r"^(today|\d{4}-\d\d-\d\d)$")] = "today"
    """Day that a chat template prints: YYYY-MM-DD, or today."""  # a template that prints it makes it an input
    chat_template_kwargs: shared.TemplateKwargs = "{}"
    template_changes: shared.TemplateChanges = "drop"
    thinking_marks: Annotated[str, ADDED, Field(pattern=r"^(model|none|\S+ \S+)$")] = "model"
    """Marks around the reasoning in an answer: those of the model, none, or 'OPENING CLOSING'."""
    special_tokens_in_prompts: rewards.SpecialTokens = "drop"

    engine: Annotated[
        Literal["vllm", "transformers", "server", "fake"],
        Heading("Engine, number type and seed"),
    ] = "vllm"
    """What samples: vllm, transformers (slower, runs anywhere), server (vLLM or SGLang behind base_urls), fake (canned
    text, for tests)."""
    base_urls: Annotated[
        tuple[Annotated[str, AfterValidator(judge.address)], ...], RUNTIME, AfterValidator(_check_servers)
    ] = ()
    """engine = server: addresses of servers that hold this model, such as http://localhost:8000."""
    api_key_env: Annotated[str, RUNTIME, AfterValidator(judge.variable)] = "VLLM_API_KEY"
    """engine = server: environment variable that holds the key of the servers; if it is not set, no key is sent. The
    key is written nowhere."""
    timeout_seconds: Annotated[float, RUNTIME, Field(gt=0)] = 600.0
    """engine = server: seconds for one completion, from the request to its last byte."""
    dtype: rewards.Dtype = "auto"
    seed: shared.Seed = 0

    workers: Annotated[Literal["auto"] | Annotated[int, Field(ge=1)], RUNTIME, Heading("Machines and memory")] = "auto"
    """Engines that share the work, each in a process with its own GPUs; auto: one for each visible GPU (over
    tensor_parallel_size), without a GPU one for each core where memory and work allow."""
    cluster: Annotated[str, RUNTIME, Field(pattern=shared.CLUSTER)] = ""
    """Where the workers run: '' on this machine, ray on the Ray cluster of this machine, or ray://HOST:PORT
    (docs/guide/machines.md)."""
    max_num_seqs: Annotated[int, RUNTIME, Field(ge=1)] = 64
    """Sequences that the engine works on at once; at each of several servers."""
    tensor_parallel_size: Annotated[int, RUNTIME, Field(ge=1)] = 1
    """GPUs that share one model (vLLM only)."""
    gpu_memory_utilization: Annotated[float, RUNTIME, Field(gt=0, le=1)] = 0.85
    """Share of a GPU's memory that vLLM takes."""
    kv_cache_mib: Annotated[int, RUNTIME, Field(ge=16)] = 512
    """Size of vLLM's KV cache on CPU, in MiB (a GPU takes its free memory)."""


class SamplingConfig(EngineConfig):
    """Settings of a command that samples completions for prompts."""

    prompts: Annotated[str, PATH, REMOTE, Heading("Model and rows")] = ""
    """Prompts: a JSON, Parquet or Arrow file, a folder of them, or hf:OWNER/NAME, with `messages` or `prompt`."""
    split: shared.Split = "train"
    limit: Annotated[int, Field(ge=0)] = 0
    """Use only the first so many prompts of the split; 0 for every prompt."""
    column: shared.Column = ()

    num_samples: Annotated[int, Field(ge=1), Heading("Sampling")] = 8
    """Completions for every prompt."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: keep the smallest set with this mass."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the so many likeliest tokens; 0 for every token."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Drop tokens less likely than this share of the likeliest one; 0 for none."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a completion, beside those of the model; they stay in the completion."""
    stop: tuple[str, ...] = ()
    """Texts of control tokens, such as <|im_end|>, that end a completion. Other stop strings are refused: they can end
    inside a token, and then the text and the token ids disagree."""
    max_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest completion, in tokens."""

    max_prompt_tokens: Annotated[int, Field(ge=1), Heading("Text to tokens")] = 1024
    """Longer prompts are dropped, with a line in dropped.parquet."""

    part: Annotated[str, Field(pattern=shared.PART), Heading("Machines and memory")] = "1/1"
    """I/N: only every N-th prompt, from the I-th. One process per GPU takes its own part and --out; `prefpipe gather`
    joins them."""
    shard_rows: Annotated[int, RUNTIME, Field(ge=0)] = 0
    """Prompts in one shard, the unit of commit and of resume; 0: about 64 shards of 16 to 512."""
