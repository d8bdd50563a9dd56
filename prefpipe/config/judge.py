"""Settings of a judge: the table of a reward with kind = "judge"."""

import re
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from prefpipe.config.base import PATH, REMOTE, RUNTIME, Config

GpuShare = Annotated[
    float,
    RUNTIME,
    Field(gt=0, le=1, description="vLLM: share of a GPU's memory; with that of other engines of the run at most 1."),
]
Dtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    Field(
        description="Number type of weights and compute; auto is bfloat16 where the hardware computes it, else float32."
    ),
]
_LONG = re.compile("[A-Za-z0-9]{24,}")  # no word of a variable's name is as long


def address(url: str) -> str:
    """An address without a slash at its end. Raises ValueError for text that is no HTTP address, and for one with a
    user, a query or a fragment, which could hold a secret."""
    if not url.startswith(("http://", "https://")):
        raise ValueError("must start with http:// or https://")
    if any(mark in url for mark in "@?#"):
        raise ValueError("must hold neither a user nor a query, and no fragment: keys come from the environment")
    try:
        parts = urlsplit(url)
        is_whole = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port beyond 65535, an open bracket
        is_whole = False
    if not is_whole or not url.isprintable() or re.search(r"[\s\\]", url):
        raise ValueError("must be http://HOST:PORT/PATH, with a port from 1 to 65535 and no white space")
    return url.rstrip("/")


def variable(name: str) -> str:
    """The name of an environment variable. Raises ValueError for text that looks like the key itself."""
    looks_like_one = re.match("(sk|pk|gsk|hf|xai|key)_", name) or _LONG.search(name)
    if looks_like_one or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("must be the name of an environment variable, not the key: set the variable, and name it here")
    return name


def _structured_by_default(values: dict[str, Any]) -> str:
    return "none" if values.get("engine") == "transformers" else "json_schema"


class Judge(Config):
    """The verdict of a language model, behind an OpenAI-compatible endpoint or in an engine on this machine."""

    kind: Literal["judge"] = "judge"
    mode: Literal["rating", "pairwise"] = "rating"
    """rating: each completion alone, 1 to 10. pairwise: completions of a prompt are compared, in both orders."""
    engine: Literal["endpoint", "vllm", "transformers", "fake"] = "endpoint"
    """Where the judge runs: behind base_url, or in an engine on this machine (model is then a directory or hub id).
    fake returns arbitrary verdicts, for dry runs."""
    base_url: Annotated[str, PATH, REMOTE, AfterValidator(address)] = "http://localhost:8000/v1"
    """Address of the endpoint; /chat/completions is added."""
    model: str = "default"
    """Name of the model at the endpoint; for an engine its directory or hub id."""
    dtype: Dtype = "auto"
    max_prompt_tokens: Annotated[int, Field(ge=1)] = 4096
    """Longest question to a judge in an engine, in tokens; a longer one gets no verdict."""
    api_key_env: Annotated[str, RUNTIME, AfterValidator(variable)] = "OPENAI_API_KEY"
    """Environment variable that holds the API key; if it is not set, no key is sent. The key is written nowhere."""
    criteria: str = "Correctness comes first, then usefulness to the user, then clarity. Length is no merit."
    """What the judge is asked to look at."""
    structured: Annotated[Literal["json_schema", "json_object", "none"], Field(default_factory=_structured_by_default)]
    """How the endpoint or engine is held to JSON: json_schema (the default: exactly the keys and values of a verdict),
    json_object (any JSON object), none (asked for in words only: the default with engine transformers, which has no
    other way). The answer is checked in any case."""
    opponents: Annotated[int, Field(ge=0)] = 0
    """pairwise: each completion meets this many of the next ones, in a ring; 0 for every other one of the prompt."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """Sampling temperature of the judge."""
    max_tokens: Annotated[int, Field(ge=1)] = 512
    """Longest answer of the judge, in tokens."""
    timeout_seconds: Annotated[float, RUNTIME, Field(gt=0)] = 60.0
    """Seconds for one request, from the look-up of the address to the last byte of the answer."""
    retries: Annotated[int, RUNTIME, Field(ge=0)] = 4
    """Most retries of a request after a refused connection, a timeout, or an answer 408, 409, 429 or 5xx."""
    backoff_seconds: Annotated[float, RUNTIME, Field(ge=0)] = 1.0
    """Pause before the first retry. It doubles with each retry; Retry-After of the endpoint can make it longer."""
    concurrency: Annotated[int, RUNTIME, Field(ge=1)] = 16
    """Requests under way at once, or sequences that an engine works on at once."""
    tensor_parallel_size: Annotated[int, RUNTIME, Field(ge=1)] = 1
    """vLLM: GPUs that share the judge."""
    gpu_memory_utilization: GpuShare = 0.85
    kv_cache_mib: Annotated[int, RUNTIME, Field(ge=16)] = 512
    """vLLM on CPU: size of the judge's KV cache, in MiB (a GPU takes its free memory)."""

    @model_validator(mode="after")
    def _can_be_structured(self) -> Self:
        if self.engine == "transformers" and self.structured != "none":
            raise ValueError(
                f'structured = "{self.structured}", but the transformers engine has no structured output: set '
                'structured = "none" (JSON is asked for in words, and checked) or engine = "vllm"'
            )
        return self
