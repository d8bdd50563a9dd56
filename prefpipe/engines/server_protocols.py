"""What servers speak: how a request is written in each protocol, and what must stand in a reply. Pure.

    vllm-generate      POST /inference/v1/generate   vLLM with --enable-scale-out: token ids in, token ids out
    vllm-completions   POST /v1/completions          any vLLM: token ids in, and out with return_token_ids
    sglang             POST /generate                SGLang

Each request names every sampling setting: a server takes those that are missing from the model's generation_config.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Reply = Any  # JSON

_ROUNDING = 1e-3  # nats: how far above 0 rounding moves a log-prob
_LEAST = -9999.0  # what vLLM writes for minus infinity, which JSON does not have


class Untrusted(ValueError):
    """A reply from which no row may be made; the text says why, behind the name of the server."""


@dataclass(frozen=True)
class Sampling:
    """How to sample one answer. temperature 0 is greedy; `schema` is the JSON Schema of the answer."""

    temperature: float
    seed: int
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Said:
    """A sampled answer: ids, their log-probs in nats, stop or length, and the labels of the weights that the server
    claims to have sampled it with."""

    token_ids: list[int]
    token_logps: list[float]
    finish_reason: str
    labels: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Wire:
    """A protocol. `model` is the name of the base or of an adapter at the server.

    sample: (model or adapter or None, prompt ids, sampling) -> request
    read_sample: (reply, prompt ids) -> what was said, whose prompt is the one that was sent
    score: (model, ids, number of them in the prompt) -> request
    read_score: (reply, ids, number of them in the prompt) -> log-probs of the ids behind the prompt

    Readers raise Untrusted for other ids than those that were sent, and KeyError, TypeError or the like for a reply of
    another form.
    """

    path: str
    sample: Callable[[str, Sequence[int], Sampling], dict[str, Any]]
    read_sample: Callable[[Reply, Sequence[int]], Said]
    score: Callable[[str, Sequence[int], int], dict[str, Any]]
    read_score: Callable[[Reply, Sequence[int], int], list[float]]


def check_end(said: Said, sampling: Sampling, stops: frozenset[int]) -> None:
    """Raise Untrusted unless an answer ends where it was asked to: at the first stop token, or at max_tokens."""
    inner, last = said.token_ids[:-1], said.token_ids[-1:]
    if stops & set(inner):
        raise Untrusted("an answer goes on behind a token that ends it")
    if said.finish_reason == "stop" and not set(last) <= stops:
        raise Untrusted(f"an answer ends with token {last}, which is none that ends answers")
    if said.finish_reason == "length" and len(said.token_ids) != sampling.max_tokens:
        raise Untrusted(f"an answer was cut at {len(said.token_ids)} tokens, not at max_tokens = {sampling.max_tokens}")
    if said.finish_reason not in ("stop", "length") or not last:
        raise Untrusted(f"an answer of {len(said.token_ids)} tokens ended with {said.finish_reason!r}")


def _generate(model: str, ids: Sequence[int], **params: Any) -> dict[str, Any]:
    return {"model": model, "token_ids": list(ids), "return_token_ids": True, "sampling_params": params}


def _vllm_params(sampling: Sampling) -> dict[str, Any]:
    greedy = sampling.temperature == 0
    shape: dict[str, Any] = {}
    if sampling.schema is not None:  # without white space: a weak model would write line breaks without end
        shape = {"structured_outputs": {"json": sampling.schema, "disable_any_whitespace": True}}
    return {
        "n": 1,
        "temperature": sampling.temperature,
        "top_p": 1.0 if greedy else sampling.top_p,
        "top_k": 0 if greedy else sampling.top_k,
        "min_p": 0.0 if greedy else sampling.min_p,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": None if greedy else sampling.seed,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "logprobs": 0,
        **shape,
    }


def _read_generate(reply: Reply, prompt: Sequence[int]) -> Said:
    (choice,) = reply["choices"]
    _check_prompt(reply["prompt_token_ids"], prompt)
    content = choice["logprobs"]["content"]
    ids = _ids(choice["token_ids"])
    if [entry["token_id"] for entry in content] != ids:
        raise Untrusted("the log-probs of an answer are of other tokens than its own")
    labels = frozenset(span["version"] for span in choice.get("weight_versions") or ())
    return Said(ids, _logps([entry["logprob"] for entry in content], len(ids)), choice["finish_reason"], labels)


def _read_generate_score(reply: Reply, ids: Sequence[int], prompt_length: int) -> list[float]:
    _check_prompt(reply["prompt_token_ids"], ids)
    return _prompt_logps(reply["prompt_logprobs"], ids, prompt_length)


def _completions(model: str, ids: Sequence[int], **params: Any) -> dict[str, Any]:
    shown = {"return_token_ids": True, "skip_special_tokens": False, "echo": False}
    return {"model": model, "prompt": list(ids), **shown, **params}


def _read_completions(reply: Reply, prompt: Sequence[int]) -> Said:
    (choice,) = reply["choices"]
    _check_prompt(choice["prompt_token_ids"], prompt)
    ids = _ids(choice["token_ids"])
    return Said(ids, _logps(choice["logprobs"]["token_logprobs"], len(ids)), choice["finish_reason"])


def _read_completions_score(reply: Reply, ids: Sequence[int], prompt_length: int) -> list[float]:
    (choice,) = reply["choices"]
    _check_prompt(choice["prompt_token_ids"], ids)
    return _prompt_logps(choice["prompt_logprobs"], ids, prompt_length)


_SCORING = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}


def _sglang(model: str, ids: Sequence[int], start: int, **params: Any) -> dict[str, Any]:
    """`model` is empty for the base."""
    adapter = {"lora_path": model} if model else {}
    shown = {"skip_special_tokens": False, "no_stop_trim": True}
    return {
        "input_ids": list(ids),
        "sampling_params": {**params, **shown},
        "return_logprob": True,
        "logprob_start_len": start,
        **adapter,
    }


def _sglang_sample(model: str, ids: Sequence[int], sampling: Sampling) -> dict[str, Any]:
    greedy = sampling.temperature == 0
    shape = {} if sampling.schema is None else {"json_schema": json.dumps(sampling.schema)}
    return _sglang(
        model,
        ids,
        len(ids) - 1,  # of the prompt only its last token comes back
        n=1,
        temperature=sampling.temperature,
        top_p=1.0 if greedy else sampling.top_p,
        top_k=-1 if greedy or not sampling.top_k else sampling.top_k,
        min_p=0.0 if greedy else sampling.min_p,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        sampling_seed=sampling.seed,
        max_new_tokens=sampling.max_tokens,
        stop_token_ids=list(sampling.stop_token_ids),
        **shape,
    )


def _read_sglang(reply: Reply, prompt: Sequence[int]) -> Said:
    meta = reply["meta_info"]
    _check_tail(meta, prompt, len(prompt) - 1)
    values, ids = _pairs(meta["output_token_logprobs"])
    if reply["output_ids"] not in (ids, ids[:-1]):  # some versions leave the stop token out
        raise Untrusted("the log-probs of an answer are of other tokens than its own")
    return Said(ids, _logps(values, len(ids)), meta["finish_reason"]["type"])


def _read_sglang_score(reply: Reply, ids: Sequence[int], prompt_length: int) -> list[float]:
    meta = reply["meta_info"]
    _check_tail(meta, ids, 0)
    values, _ = _pairs(meta["input_token_logprobs"])
    return _logps(values[prompt_length:], len(ids) - prompt_length)


def _check_tail(meta: Any, ids: Sequence[int], start: int) -> None:
    """SGLang says how many tokens it read, and gives those from `start` on."""
    _, tail = _pairs(meta["input_token_logprobs"])
    if meta["prompt_tokens"] != len(ids) or tail != list(ids[start:]):
        raise Untrusted(_OTHER_IDS)


_OTHER_IDS = "it worked on other token ids than those that were sent"


def _check_prompt(found: Any, sent: Sequence[int]) -> None:
    if found != list(sent):
        raise Untrusted(_OTHER_IDS)


def _ids(found: Any) -> list[int]:
    if not all(type(token) is int and token >= 0 for token in found):
        raise Untrusted("an answer holds what is no token id")
    return list(found)


def _pairs(entries: Any) -> tuple[list[Any], list[int]]:
    """(values, ids) of [value, id, text] as SGLang writes them."""
    return [entry[0] for entry in entries], _ids([entry[1] for entry in entries])


def _prompt_logps(entries: Any, ids: Sequence[int], prompt_length: int) -> list[float]:
    """Log-probs of ids behind the prompt, from a dict by token id for each place; the first place has none."""
    if len(entries) != len(ids):
        raise Untrusted(f"it gave log-probs of {len(entries)} tokens for {len(ids)}")
    places = range(prompt_length, len(ids))
    if any(str(ids[place]) not in entries[place] for place in places):
        raise Untrusted("the log-probs of a sequence are of other tokens than its own")
    return _logps([entries[place][str(ids[place])]["logprob"] for place in places], len(places))


def _logps(values: Sequence[Any], count: int) -> list[float]:
    if len(values) != count:
        raise Untrusted(f"it gave {len(values)} log-probs for {count} tokens")
    numbers = [float(value) for value in values]
    for number in numbers:
        if not (math.isfinite(number) and _LEAST < number <= _ROUNDING):
            raise Untrusted(f"a log-prob is {number:g}, which the logarithm of a probability is not")
    return numbers


PROTOCOLS = {
    "vllm-generate": Wire(
        "/inference/v1/generate",
        lambda model, ids, sampling: _generate(model, ids, **_vllm_params(sampling), detokenize=False),
        _read_generate,
        lambda model, ids, _prompt_length: _generate(model, ids, **_SCORING, detokenize=False),
        _read_generate_score,
    ),
    "vllm-completions": Wire(
        "/v1/completions",
        lambda model, ids, sampling: _completions(model, ids, **_vllm_params(sampling)),
        _read_completions,
        lambda model, ids, _prompt_length: _completions(model, ids, **_SCORING),
        _read_completions_score,
    ),
    "sglang": Wire(
        "/generate",
        _sglang_sample,
        _read_sglang,
        lambda model, ids, _prompt_length: _sglang(model, ids, 0, temperature=0.0, max_new_tokens=1, sampling_seed=0),
        _read_sglang_score,
    ),
}
