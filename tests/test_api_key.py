"""The key of an endpoint: it goes into the header of a request, and shows nowhere else."""

import copy
import io
import json
import logging
import pickle
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import TracebackType

import pytest
from rich.console import Console
from rich.traceback import Traceback

from prefpipe import api_key
from prefpipe.api_key import ApiKey
from prefpipe.config.judge import Judge
from prefpipe.errors import StorageError, UsageError
from prefpipe.rewards.endpoint import Question, ask_all
from tests.rewards.server import completion, serving

KEY = "sk-nobody-may-see-this-0"
QUESTION = [Question([{"role": "user", "content": "?"}], {})]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> ApiKey:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    return api_key.read("JUDGE_KEY")


@dataclass
class Holder:
    key: ApiKey


def test_no_way_to_write_it_shows_it(key: ApiKey) -> None:
    texts = [
        str(key),
        repr(key),
        f"{key}",
        f"{key!r:>40}",
        f"{key!s}",
        f"{[key]}",
        str({key: 1}),
        repr(Holder(key)),
        ascii(key),
    ]
    texts += ["%s" % key, "%r" % (key,), "{0}".format(key), json.dumps({"k": key}, default=str)]  # noqa: UP031, UP030, UP032
    stream = io.StringIO()
    logging.getLogger("a").addHandler(logging.StreamHandler(stream))
    logging.getLogger("a").error("the key %s of %r", key, Holder(key))
    Console(file=stream).print(key, [key], Holder(key))
    assert "*" in stream.getvalue()
    assert KEY not in "".join(texts) + stream.getvalue()
    with pytest.raises(TypeError):
        json.dumps(key)


@pytest.mark.parametrize("save", [pickle.dumps, copy.copy, copy.deepcopy, lambda key: asdict(Holder(key))])
def test_it_leaves_no_process(key: ApiKey, save: object) -> None:
    with pytest.raises(TypeError, match="leaves no process"):
        save(key)  # type: ignore[operator]  # each is a function


@pytest.mark.parametrize("end", ["\r", "\n", "\t", " \r\n", "\u2003"])
def test_white_space_around_it_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}{end}")
    with serving(lambda _request: (401, {"error": f"bad {KEY}"})) as endpoint, pytest.raises(UsageError) as caught:
        ask_all(Judge(base_url=endpoint.base_url, api_key_env="JUDGE_KEY"), QUESTION)
    assert endpoint.headers[0]["authorization"] == f"Bearer {KEY}"
    assert KEY not in caught.value.message


@pytest.mark.parametrize("inside", ["\n", "\r", "\t", "\x1b", "\x7f", "é", "\u200b", "\udcff"])
def test_what_no_header_takes_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, inside: str) -> None:
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}{inside}{KEY}")
    with pytest.raises(UsageError, match="the key in JUDGE_KEY") as caught:
        api_key.read("JUDGE_KEY")
    assert not shown(caught.value)


@pytest.mark.parametrize("text", [f"bad {KEY}!", json.dumps({"k": KEY}), f"?key={KEY}"])
def test_it_is_cut_out_of_what_others_say(key: ApiKey, text: str) -> None:
    assert key.cut_out_of(text) == text.replace(KEY, "***")


@pytest.mark.parametrize("odd", ['a"b/c\\d+e', "a b&c=d%", "EMPTY"])
def test_it_is_cut_out_in_other_spellings(monkeypatch: pytest.MonkeyPatch, odd: str) -> None:
    monkeypatch.setenv("JUDGE_KEY", odd)
    cut = api_key.read("JUDGE_KEY").cut_out_of(json.dumps({"said": f"your key {odd} is bad"}))
    assert json.loads(cut) == {"said": "your key *** is bad"}


def test_a_placeholder_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """`x` or `1` for a local server: cut out, it would take the verdict with it."""
    monkeypatch.setenv("JUDGE_KEY", "1")
    with serving(lambda _request: completion('{"rating": 10}')) as endpoint:
        (reply,) = ask_all(Judge(base_url=endpoint.base_url, api_key_env="JUDGE_KEY"), QUESTION)
    assert reply.text == '{"rating": 10}'


@pytest.mark.parametrize(
    "answer", [(401, {"error": KEY}), (404, {"error": KEY}), (429, {"error": KEY}), (422, {"error": KEY}), None]
)
def test_no_error_shows_it_also_with_the_variables_of_every_frame(answer: tuple[int, object] | None) -> None:
    """As rich, pytest or Sentry print them, with the errors behind it."""
    calls: Iterator[tuple[int, object]] = iter([(422, {}), completion("x")])
    with serving(lambda _request: next(calls, answer or (422, {}))) as endpoint:
        url = endpoint.base_url if answer else "http://127.0.0.1:1/v1"
        if answer and answer[0] != 422:
            list(calls)
        with pytest.raises((UsageError, StorageError)) as caught:
            ask_all(Judge(base_url=url, api_key_env="JUDGE_KEY", retries=0), QUESTION)
    assert not shown(caught.value)


def shown(error: BaseException) -> bool:
    """Whether the key stands in an error, in those behind it, or in the text of a variable of a frame of ours."""
    stream = io.StringIO()
    traceback: TracebackType | None = error.__traceback__
    while traceback and "test_api_key" in traceback.tb_frame.f_code.co_filename:
        traceback = traceback.tb_next  # this test knows the key
    assert traceback is not None
    Console(file=stream, width=400).print(
        Traceback.from_exception(type(error), error.with_traceback(traceback), traceback, show_locals=True,
                                 locals_max_length=None, locals_max_string=None)
    )  # fmt: skip
    assert "locals" in stream.getvalue()
    return KEY in stream.getvalue()
