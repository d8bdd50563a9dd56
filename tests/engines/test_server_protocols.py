"""How requests are written and replies are read, by hand-written JSON in the form of each server."""

import json
from copy import deepcopy
from typing import Any

import pytest

from prefpipe.engines.server_protocols import PROTOCOLS, Said, Sampling, Untrusted, check_end

HOT = Sampling(0.7, 2**62, 0.9, 40, 0.05, 8, (2, 5), {"type": "object"})
GREEDY = Sampling(0.0, 7, 0.9, 40, 0.05, 8, (2,))
PROMPT, ANSWER = [1, 9, 4], [7, 2]
WHOLE = [*PROMPT, *ANSWER]
IN_PROMPT = [None, *({str(i): {"logprob": -0.5 * i, "rank": 1, "decoded_token": "x"}} for i in WHOLE[1:])]
REPLIES: dict[str, Any] = {
    "vllm-generate": {
        "prompt_token_ids": PROMPT,
        "choices": [
            {
                "token_ids": ANSWER,
                "finish_reason": "stop",
                "logprobs": {"content": [{"token_id": 7, "logprob": -1.5}, {"token_id": 2, "logprob": -0.25}]},
                "weight_versions": [{"version": "a", "start": 0, "end": 2}],
            }
        ],
    },
    "vllm-completions": {
        "choices": [
            {
                "prompt_token_ids": PROMPT,
                "token_ids": ANSWER,
                "finish_reason": "stop",
                "logprobs": {"token_logprobs": [-1.5, -0.25]},
            }
        ]
    },
    "sglang": {
        "output_ids": ANSWER,
        "meta_info": {
            "prompt_tokens": 3,
            "finish_reason": {"type": "stop", "matched": 2},
            "input_token_logprobs": [[None, 4, None]],
            "output_token_logprobs": [[-1.5, 7, None], [-0.25, 2, None]],
        },
    },
}
SCORES: dict[str, Any] = {
    "vllm-generate": {"prompt_token_ids": WHOLE, "prompt_logprobs": IN_PROMPT, "choices": [{}]},
    "vllm-completions": {"choices": [{"prompt_token_ids": WHOLE, "prompt_logprobs": IN_PROMPT}]},
    "sglang": {
        "meta_info": {
            "prompt_tokens": 5,
            "input_token_logprobs": [[None, 1, None], *([-0.5 * i, i, None] for i in WHOLE[1:])],
        }
    },
}


def changed(value: Any, path: str, new: Any) -> Any:
    """A copy with another value at a dotted path."""
    made = deepcopy(value)
    *inner, last = path.split(".")
    at = made
    for key in inner:
        at = at[int(key)] if isinstance(at, list) else at[key]
    at[int(last) if isinstance(at, list) else last] = new
    return made


def test_a_request_of_vllm_names_every_setting_of_sampling() -> None:
    made = PROTOCOLS["vllm-generate"].sample("m", PROMPT, HOT)
    assert (made["model"], made["token_ids"], made["return_token_ids"]) == ("m", PROMPT, True)
    params = made["sampling_params"]
    assert {k: params[k] for k in ("temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "n")} == {
        "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": 2**62, "max_tokens": 8, "n": 1
    }  # fmt: skip
    assert (params["repetition_penalty"], params["stop_token_ids"], params["logprobs"]) == (1.0, [2, 5], 0)
    assert params["structured_outputs"]["json"] == {"type": "object"}
    flat = PROTOCOLS["vllm-completions"].sample("m", PROMPT, HOT)
    assert flat["prompt"] == PROMPT
    assert {k: flat[k] for k in params.keys() - {"detokenize"}} == {k: v for k, v in params.items() if k in flat}


def test_a_request_of_sglang_has_its_words() -> None:
    made = PROTOCOLS["sglang"].sample("adapter-x", PROMPT, HOT)
    params = made["sampling_params"]
    assert (made["input_ids"], made["lora_path"], made["return_logprob"]) == (PROMPT, "adapter-x", True)
    assert (params["max_new_tokens"], params["sampling_seed"], params["top_k"]) == (8, 2**62, 40)
    assert json.loads(params["json_schema"]) == {"type": "object"}
    base = PROTOCOLS["sglang"].sample("", PROMPT, GREEDY)
    assert "lora_path" not in base
    assert (base["sampling_params"]["top_k"], base["sampling_params"]["top_p"]) == (-1, 1.0)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_greedy_is_not_truncated_and_scoring_asks_for_the_prompt(name: str) -> None:
    wire = PROTOCOLS[name]
    made = wire.sample("m", PROMPT, GREEDY)
    params = made.get("sampling_params", made)
    assert (params["temperature"], params["top_p"], params["min_p"]) == (0.0, 1.0, 0.0)
    scoring = wire.score("m", WHOLE, 3)
    params = scoring.get("sampling_params", scoring)
    assert params.get("max_tokens", params.get("max_new_tokens")) == 1
    assert params.get("prompt_logprobs", scoring.get("logprob_start_len")) == 0


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_reply_is_read(name: str) -> None:
    said = PROTOCOLS[name].read_sample(REPLIES[name], PROMPT)
    labels = frozenset({"a"}) if name == "vllm-generate" else frozenset[str]()
    assert said == Said(ANSWER, [-1.5, -0.25], "stop", labels)
    assert PROTOCOLS[name].read_score(SCORES[name], WHOLE, 3) == [-3.5, -1.0]


def test_sglang_may_leave_the_stop_token_out_of_its_ids() -> None:
    reply = changed(REPLIES["sglang"], "output_ids", [7])
    assert PROTOCOLS["sglang"].read_sample(reply, PROMPT).token_ids == ANSWER


@pytest.mark.parametrize(
    ("name", "path", "value", "words"),
    [
        ("vllm-generate", "prompt_token_ids", [9, 4], "other token ids"),
        ("vllm-generate", "choices.0.token_ids", [7, 3], "of other tokens"),
        ("vllm-generate", "choices.0.token_ids", [7, True], "no token id"),
        ("vllm-generate", "choices.0.logprobs.content.0.logprob", -9999.0, "is -9999"),
        ("vllm-generate", "choices.0.logprobs.content.0.logprob", 12.5, r"is 12\.5"),
        ("vllm-generate", "choices.0.logprobs.content.0.logprob", float("nan"), "is nan"),
        ("vllm-completions", "choices.0.prompt_token_ids", [1, 9, 4, 4], "other token ids"),
        ("vllm-completions", "choices.0.logprobs.token_logprobs", [-1.5], "1 log-probs for 2 tokens"),
        ("sglang", "meta_info.prompt_tokens", 2, "other token ids"),
        ("sglang", "meta_info.input_token_logprobs", [[None, 5, None]], "other token ids"),
        ("sglang", "output_ids", [7, 3], "of other tokens"),
        ("sglang", "meta_info.output_token_logprobs.1.0", 3.0, "is 3"),
    ],
)
def test_a_reply_about_something_else_is_not_believed(name: str, path: str, value: Any, words: str) -> None:
    with pytest.raises(Untrusted, match=words):
        PROTOCOLS[name].read_sample(changed(REPLIES[name], path, value), PROMPT)


@pytest.mark.parametrize(
    ("name", "path", "value", "words"),
    [
        ("vllm-generate", "prompt_token_ids", PROMPT, "other token ids"),
        ("vllm-generate", "prompt_logprobs", IN_PROMPT[:-1], "log-probs of 4 tokens for 5"),
        ("vllm-generate", "prompt_logprobs.4", {"3": {"logprob": -1.0}}, "of other tokens"),
        ("vllm-completions", "choices.0.prompt_token_ids", WHOLE[1:], "other token ids"),
        ("vllm-completions", "choices.0.prompt_logprobs.3", {"7": {"logprob": -9999.0}}, "is -9999"),
        ("sglang", "meta_info.input_token_logprobs", [[None, 1, None]], "other token ids"),
        ("sglang", "meta_info.input_token_logprobs.1.1", 8, "other token ids"),
    ],
)
def test_scores_of_something_else_are_not_believed(name: str, path: str, value: Any, words: str) -> None:
    with pytest.raises(Untrusted, match=words):
        PROTOCOLS[name].read_score(changed(SCORES[name], path, value), WHOLE, 3)


@pytest.mark.parametrize(
    ("ids", "reason", "words"),
    [
        ([7, 2, 7, 2], "stop", "goes on behind a token that ends it"),
        ([7, 3], "stop", "none that ends answers"),
        ([7, 3], "length", "cut at 2 tokens, not at max_tokens = 8"),
        ([7, 3], "abort", "ended with 'abort'"),
        ([], "stop", "0 tokens"),
    ],
)
def test_an_answer_ends_as_it_was_asked_to(ids: list[int], reason: str, words: str) -> None:
    with pytest.raises(Untrusted, match=words):
        check_end(Said(ids, [-1.0] * len(ids), reason), HOT, frozenset({2, 5}))


@pytest.mark.parametrize(("ids", "reason"), [([7, 2], "stop"), ([2], "stop"), ([7] * 8, "length")])
def test_ends_that_are_right(ids: list[int], reason: str) -> None:
    check_end(Said(ids, [-1.0] * len(ids), reason), HOT, frozenset({2, 5}))
