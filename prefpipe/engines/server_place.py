"""What a server is and has: its protocol, its build, the model and the adapter that it serves under which names."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prefpipe import http
from prefpipe.engines.server_protocols import PROTOCOLS, Wire
from prefpipe.errors import UsageError
from prefpipe.http import Answer, Link
from prefpipe.models.policy import Policy

Refuse = Callable[[str, Answer], Exception]  # the error for an answer of a server, by its URL


@dataclass(frozen=True)
class Place:
    """What a server is and has: its protocol, its build (vllm-0.32.0), and the names of the base and of the policy: the
    adapter or, without one, the base."""

    protocol: str
    build: str
    base: str
    policy: str

    @property
    def wire(self) -> Wire:
        """How to talk to it."""
        return PROTOCOLS[self.protocol]


async def look(link: Link, url: str, policy: Policy, longest: int, refuse: Refuse) -> Place:
    """What a server is and has. Raises UsageError for one that cannot serve this policy."""
    protocol, build = await _identify(link, url, refuse)
    models = await _get(link, url, "/v1/models", refuse)
    entries = [entry for entry in (models or {}).get("data", ()) if isinstance(entry, dict)]
    bases = [entry for entry in entries if not entry.get("parent")]
    if not bases:
        raise UsageError(f"the server at {url} lists no model: GET /v1/models", "check base_urls")
    room = bases[0].get("max_model_len")
    if isinstance(room, int) and room < longest + 1:
        raise UsageError(
            f"the server at {url} takes {room} tokens, and prompt and completion have up to {longest}",
            f"start it with room for {longest + 1} (vLLM: --max-model-len), or lower max_prompt_tokens and max_tokens",
        )
    adapter = ""
    if policy.adapter is not None:
        adapter = f"adapter-{policy.adapter_weights}"
        if adapter not in {str(entry.get("id")) for entry in entries}:
            await _load_adapter(link, url, protocol, adapter, policy)
    base = "" if protocol == "sglang" else str(bases[0]["id"])
    return Place(protocol, build, base, adapter or base)


def json_of(url: str, answer: Answer) -> Any:
    """The JSON of an answer. Raises UsageError for any other."""
    try:
        return json.loads(answer.text)
    except (ValueError, RecursionError):
        raise UsageError(f"the server at {url} answers what is no JSON: {answer.shown}", "check base_urls") from None


async def _identify(link: Link, url: str, refuse: Refuse) -> tuple[str, str]:
    """The protocol of a server, and its build."""
    version = await _get(link, url, "/version", refuse)
    if version is not None:
        # A route that takes POST alone answers 405 to GET; one that is not there 404.
        has_tokens = await http.ask(link, url + PROTOCOLS["vllm-generate"].path)
        if has_tokens.failure:
            raise refuse(url, has_tokens)
        protocol = "vllm-completions" if has_tokens.status == 404 else "vllm-generate"
        return protocol, f"vllm-{_word(version.get('version'))}"
    for path in ("/server_info", "/get_server_info"):
        info = await _get(link, url, path, refuse)
        if info is not None:
            return "sglang", f"sglang-{_word(info.get('version'))}"
    raise UsageError(
        f"the server at {url} is neither vLLM nor SGLang: it answers neither /version nor /server_info",
        "check base_urls; a router must let these paths through",
    )


def _word(value: Any) -> str:
    """A version as one word of a name."""
    text = "".join(c for c in str(value or "unknown") if c.isalnum() or c in ".+-_")
    return text[:40]


async def _get(link: Link, url: str, path: str, refuse: Refuse) -> dict[str, Any] | None:
    """The JSON object at a path; None where there is no such path."""
    answer = await http.ask(link, url + path)
    if answer.status in (404, 405):
        return None
    if answer.status != 200:
        raise refuse(url, answer)
    value = json_of(url, answer)
    return value if isinstance(value, dict) else None


async def _load_adapter(link: Link, url: str, protocol: str, name: str, policy: Policy) -> None:
    """Ask a server to load the adapter under its name; the path must be there for the server too."""
    assert policy.adapter is not None
    path = str(policy.adapter.absolute())
    route = "/load_lora_adapter" if protocol == "sglang" else "/v1/load_lora_adapter"
    answer = await http.ask(link, url + route, {"lora_name": name, "lora_path": path})
    if answer.status != 200:
        how = (
            f"--enable-lora --lora-paths {name}={path}"
            if protocol == "sglang"
            else f"--enable-lora --lora-modules {name}={path}, or with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
        )
        raise UsageError(
            f"the server at {url} has no adapter {name} and does not load it: {answer.status} {answer.shown}",
            f"start it with {how}; the path must lead to the adapter on the machine of the server",
        )
