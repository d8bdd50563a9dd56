"""A server for tests: it computes with a tiny model, speaks all three protocols, and lies when it is told to."""

import dataclasses
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prefpipe.engines.base import Draw, Engine, EngineSettings, Sample, ScoreRequest
from prefpipe.engines.base import Request as Prompt
from prefpipe.forward import load
from prefpipe.models.chat import Chat, load_chat
from prefpipe.models.encoding import encode
from prefpipe.models.policy import resolve
from tests.rewards.server import Endpoint, serving

PATHS = {"vllm-generate": "/inference/v1/generate", "vllm-completions": "/v1/completions", "sglang": "/generate"}
MAX_TOKENS, WINDOW = 6, 3
DRAWS = (Draw(0, 0, 0.0), Draw(1, 11, 1.0), Draw(2, 12, 0.7))
Request = dict[str, Any]
NOT_FOUND = (404, {"detail": "Not Found"})
VERSIONS = {"vllm": "0.32.0", "sglang": "0.5.9"}


@dataclass
class Standin:
    """`lies` may change at any time; `refuse(request)` answers in place of the server unless it gives False.

    truncates: forgets the first tokens of a long prompt     retokenises: reads a token as another one
    hides: truncates, and says that it did not                processed: log-probs of what it samples from
    cuts: ends answers early                                  runs_on: goes on behind the end of an answer
    no_adapter: answers with the base                         swapped: has other weights
    infinite: a log-prob is what vLLM writes for -inf         labelled: says so of its weights, one label for each call
    """

    model: Path
    other: Path | None = None
    adapter: Path | None = None
    protocol: str = "vllm-generate"
    lies: set[str] = field(default_factory=set)
    refuse: Callable[[Request], Any] = lambda _request: False
    names: set[str] = field(default_factory=set)
    loads_adapters: bool = True
    room: int = 2048
    asked: list[Request] = field(default_factory=list)
    met: set[frozenset[str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._lock, self._active = threading.Lock(), list[str]()
        self._policy = self._load(self.model)
        self._swapped = self._load(self.other) if self.other else None

    @property
    def build(self) -> str:
        name = self.protocol.partition("-")[0]
        return f"{name}-{VERSIONS[name]}"

    def answer(self, request: Request) -> Any:
        refused = self.refuse(request)
        if refused is not False:
            return refused
        path, is_post = request["path"], request["method"] == "POST"
        if path in PATHS.values():
            known = path == PATHS[self.protocol] or (self.protocol == "vllm-generate" and path == "/v1/completions")
            if not known:
                return NOT_FOUND
            return (200, self._work(request)) if is_post else (405, {"detail": "Method Not Allowed"})
        return self._about(request) if not is_post else self._loaded(request)

    def _about(self, request: Request) -> Any:
        is_sglang = self.protocol == "sglang"
        if request["path"] == ("/server_info" if is_sglang else "/version"):
            return 200, {"version": VERSIONS["sglang" if is_sglang else "vllm"]}
        if request["path"] == "/v1/models":
            base = {"id": "policy", "parent": None, "max_model_len": self.room}
            return 200, {"data": [base, *({"id": name, "parent": "policy"} for name in sorted(self.names))]}
        return NOT_FOUND

    def _loaded(self, request: Request) -> Any:
        route = "/load_lora_adapter" if self.protocol == "sglang" else "/v1/load_lora_adapter"
        if request["path"] != route or not self.loads_adapters or not Path(request["lora_path"]).is_dir():
            return NOT_FOUND
        self.names.add(request["lora_name"])
        return 200, {"success": True}

    def _work(self, request: Request) -> Any:
        ids = list(request.get("token_ids") or request.get("prompt") or request.get("input_ids"))
        params = request.get("sampling_params", request)
        name = request.get("lora_path", "") if self.protocol == "sglang" else request["model"]
        assert name in {"", "policy", *self.names}, name
        with self._lock:
            self.asked.append(request)
            self._active.append("adapter" if name in self.names else "base")
            self.met.add(frozenset(self._active))
        try:
            with self._lock:
                return self._reply(ids, params, request, adapter=name in self.names)
        finally:
            with self._lock:
                self._active.remove("adapter" if name in self.names else "base")

    def _reply(self, ids: list[int], params: Any, request: Request, *, adapter: bool) -> Any:
        read = self._read(ids)
        said_ids = ids if "hides" in self.lies else read
        off = bool(self.adapter) and (not adapter or "no_adapter" in self.lies)
        policy = self._swapped if "swapped" in self.lies else self._policy
        with torch.no_grad(), load.adapter_off(policy, off=off) if self.adapter else ExitStack():
            in_prompt = [None, *[-1.0] * (len(said_ids) - len(read)), *self._logps(policy, read)]
            out, values, reason = self._sample(policy, read, params)
        if "infinite" in self.lies:
            in_prompt[-1] = values[0] = -9999.0
        if self.protocol == "sglang":
            start = request["logprob_start_len"]
            said = list(zip(in_prompt, said_ids, [None] * len(said_ids), strict=False))[start:]
            meta = {"prompt_tokens": len(said_ids), "completion_tokens": len(out), "finish_reason": {"type": reason}}
            meta |= {"input_token_logprobs": [(None, *said[0][1:]), *said[1:]]}
            return {"output_ids": out, "meta_info": meta | {"output_token_logprobs": [
                [v, i, None] for v, i in zip(values, out, strict=True)]}}  # fmt: skip
        entries = [
            None if value is None else {str(token): {"logprob": value, "rank": 1}}
            for token, value in zip(said_ids, in_prompt, strict=False)
        ]
        prompt = {"prompt_token_ids": said_ids}
        prompt |= {"prompt_logprobs": entries if params.get("prompt_logprobs") is not None else None}
        choice: dict[str, Any] = {"index": 0, "token_ids": out, "finish_reason": reason}
        if request["path"] == "/v1/completions":
            return {"choices": [choice | prompt | {"logprobs": {"token_logprobs": values}}]}
        labels = [{"version": str(len(self.asked) if "labelled" in self.lies else 1), "start": 0, "end": len(out)}]
        content = [{"token_id": token, "logprob": value} for token, value in zip(out, values, strict=True)]
        return {"choices": [choice | {"logprobs": {"content": content}, "weight_versions": labels}], **prompt}

    def _read(self, ids: list[int]) -> list[int]:
        """What it makes of the ids that were sent."""
        if {"truncates", "hides"} & self.lies and len(ids) > 8:
            return ids[4:]
        return [ids[0], ids[1] + 1, *ids[2:]] if "retokenises" in self.lies and len(ids) > 2 else ids

    def _logps(self, policy: Any, ids: Sequence[int]) -> list[float]:
        values = policy(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        return values[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1).tolist()

    def _sample(self, policy: Any, ids: Sequence[int], params: Any) -> tuple[list[int], list[float], str]:
        most = params.get("max_tokens", params.get("max_new_tokens"))
        stops = set(params.get("stop_token_ids") or ())
        source = torch.Generator().manual_seed(params.get("seed", params.get("sampling_seed")) or 0)
        out: list[int] = []
        values: list[float] = []
        while True:
            raw = policy(input_ids=torch.tensor([[*ids, *out]])).logits[0, -1].float()
            shaped = _shaped(raw, params)
            token = int(raw.argmax() if params["temperature"] == 0 else torch.multinomial(shaped, 1, generator=source))
            chances = shaped.log() if "processed" in self.lies else raw.log_softmax(-1)
            out.append(token)
            values.append(float(chances[token]))
            if token in stops and "runs_on" not in self.lies:
                return out, values, "stop"
            if len(out) >= (most if "cuts" not in self.lies else min(most, 3)):
                return out, values, "length"

    def _load(self, model: Path) -> Any:
        policy = load.load_model(model, "float32")
        return load.load_adapter(policy, self.adapter, trainable=False) if self.adapter else policy


def _shaped(raw: torch.Tensor, params: Any) -> torch.Tensor:
    """Probabilities [V] after temperature and top_p."""
    chances = (raw / max(params["temperature"], 1e-6)).softmax(-1)
    ordered, order = chances.sort(descending=True)
    outside = ordered.cumsum(-1) - ordered >= params.get("top_p", 1.0)
    chances[order[outside]] = 0
    return chances / chances.sum()


@contextmanager
def running(standin: Standin) -> Generator[Endpoint]:
    """The server, and what is asked of it; its URL has no path."""
    with serving(standin.answer) as endpoint:
        endpoint.base_url = endpoint.base_url.removesuffix("/v1")
        yield endpoint


def settings(model: Path, *urls: str, adapter: str = "none", **more: Any) -> EngineSettings:
    made = EngineSettings(resolve(str(model), adapter), load_chat(model), "float32", 0.9, MAX_TOKENS, 256, WINDOW, 64)
    return dataclasses.replace(
        made, **{"base_urls": urls, "api_key_env": "VLLM_API_KEY", "timeout_seconds": 120.0, **more}
    )


def requests(chat: Chat, count: int = 5) -> list[Prompt]:
    return [Prompt(f"p{n}", encode(chat, f"bird {n}" + "!" * n), DRAWS) for n in range(count)]


def collect(engine: Engine, given: Iterator[Prompt] | list[Prompt]) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for request, samples in engine.generate(given):
        assert request.prompt_id not in found
        found[request.prompt_id] = samples
    return found


def sequences(chat: Chat, samples: dict[str, list[Sample]]) -> list[ScoreRequest]:
    prompts = {r.prompt_id: r.prompt_token_ids for r in requests(chat)}
    return [ScoreRequest(f"{n}/{s.sample_index}", prompts[n], s.token_ids) for n, own in samples.items() for s in own]


def distance(a: dict[str, list[float]], b: dict[str, list[float]]) -> float:
    assert a.keys() == b.keys()
    return max(abs(x - y) for key in a for x, y in zip(a[key], b[key], strict=True))
