"""Questions to a language model behind an OpenAI-compatible endpoint: many at once, with retries.

The API key comes from the environment. It is cut out of every text that leaves this module.
"""

import json
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from prefpipe import log
from prefpipe.clock import monotonic
from prefpipe.config.judge import Judge
from prefpipe.errors import StorageError, UsageError
from prefpipe.schemas import Message

_TRANSIENT = (408, 409, 429, 500, 502, 503, 504)  # the same request may succeed later
_REFUSED = (401, 403, 404)  # it never will
_FORMAT_UNKNOWN = (400, 406, 415, 422, 500, 501)  # what endpoints answer to a response_format that they do not know
_LOOSER = {"json_schema": ("json_object", "none"), "json_object": ("none",), "none": ()}
_LONGEST_PAUSE = 60.0
_SHOWN = 300
_MOST_BYTES = 16 << 20  # of an answer, unpacked
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
_PACKED = ("content-encoding", "content-length", "transfer-encoding")


@dataclass(frozen=True)
class Question:
    """Messages to the judge, and the JSON Schema of its answer."""

    messages: list[Message]
    schema: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """The judge's answer, or None with status timeout, crash or unparsable and the reason."""

    text: str | None
    status: str = "ok"
    detail: str | None = None


@dataclass(frozen=True)
class _Session:
    """What the questions of one call share. `accepted` is set once the endpoint has answered one in our format."""

    client: httpx.Client
    settings: Judge
    key: str
    stopping: threading.Event
    accepted: threading.Event


def ask_all(settings: Judge, questions: Sequence[Question]) -> list[Reply]:
    """Replies in the order of the questions.

    A question that times out or fails after the last retry has a reply without a text. Raises UsageError when the
    endpoint refuses the request (401, 403, 404) or the format of `structured`, StorageError when it cannot be reached
    or stays overloaded (429): the run then stops and can resume, instead of filling with missing rewards.
    """
    key = _key(settings.api_key_env)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with (
        httpx.Client(timeout=settings.timeout_seconds, headers=headers, limits=_limits(settings)) as client,
        ThreadPoolExecutor(settings.concurrency) as pool,
    ):
        session = _Session(client, settings, key, threading.Event(), threading.Event())
        asked = [pool.submit(_ask, session, question) for question in questions]
        reached = log.remarks("judge", len(asked), "questions answered")
        try:
            replies: list[Reply] = []
            for future in asked:
                replies.append(future.result())
                reached(len(replies))
            return replies
        except BaseException:
            session.stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def body(settings: Judge, question: Question, structured: str) -> dict[str, Any]:
    """The request, as JSON. `structured`: the format to ask for, as in the settings."""
    formats: dict[str, Any] = {
        "json_schema": {
            "type": "json_schema",
            "json_schema": {"name": "verdict", "schema": question.schema, "strict": True},
        },
        "json_object": {"type": "json_object"},
    }
    wanted = {"response_format": formats[structured]} if structured in formats else {}
    return {
        "model": settings.model,
        "messages": question.messages,
        "temperature": settings.temperature,
        "max_tokens": settings.max_tokens,
        **wanted,
    }


def pause(settings: Judge, attempt: int, retry_after: str | None) -> float:
    """Seconds before retry `attempt` (0 is the first): doubling, at least what Retry-After says, at most a minute."""
    wanted = float(retry_after) if retry_after and _SECONDS.fullmatch(retry_after) else 0.0
    return min(max(settings.backoff_seconds * 2**attempt, wanted), _LONGEST_PAUSE)


def _ask(session: _Session, question: Question) -> Reply:
    settings = session.settings
    attempt = 0
    while True:
        answer = _post(session, question, settings.structured)
        if attempt == settings.retries or not _is_transient(answer):
            return _reply(_check_format(session, question, answer), settings, session.key)
        retry_after = None if isinstance(answer, httpx.TransportError) else answer.headers.get("retry-after")
        if session.stopping.wait(pause(settings, attempt, retry_after)):
            return Reply(None, "crash", "stopped")
        attempt += 1


def _key(name: str) -> str:
    """The key in an environment variable, without white space around it. Raises UsageError for what no header takes."""
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"the key in {name} has characters that no key has", "set it again, without line breaks")
    return key


def _post(session: _Session, question: Question, structured: str) -> httpx.Response | httpx.TransportError:
    """The whole answer, unpacked, or why there is none: too late, too long, or unreachable."""
    settings = session.settings
    deadline = monotonic() + settings.timeout_seconds
    url = f"{settings.base_url}/chat/completions"
    content = bytearray()
    try:
        asked = json.dumps(body(settings, question, structured)).encode()
        headers = {"content-type": "application/json"}
        with session.client.stream("POST", url, content=asked, headers=headers) as answer:
            for chunk in answer.iter_bytes():
                content += chunk
                if monotonic() > deadline:
                    return httpx.ReadTimeout("the answer does not end")
                if len(content) > _MOST_BYTES:
                    return httpx.Response(502, content=f"an answer of more than {_MOST_BYTES:,} bytes".encode())
            kept = [(name, value) for name, value in answer.headers.multi_items() if name not in _PACKED]
            return httpx.Response(answer.status_code, headers=kept, content=bytes(content))
    except httpx.TransportError as error:
        return error
    except httpx.DecodingError as error:
        return httpx.Response(502, content=f"an answer that cannot be unpacked: {error}".encode())
    except httpx.InvalidURL as error:
        raise UsageError(f"base_url = '{settings.base_url}' is no address: {error}", "mend base_url") from error


def _check_format(
    session: _Session, question: Question, answer: httpx.Response | httpx.TransportError
) -> httpx.Response | httpx.TransportError:
    """The answer. Raises UsageError when the endpoint does not know the format of `structured`.

    Endpoints report that in different words, so it is found by experiment. As long as no question was accepted, one
    that fails is asked in looser formats. If one of these succeeds and the question fails once more as before, the
    format is the reason.
    """
    structured = session.settings.structured
    if _code(answer) == 200:
        session.accepted.set()
    if _code(answer) not in _FORMAT_UNKNOWN or session.accepted.is_set():
        return answer
    for looser in _LOOSER[structured]:
        if _code(_post(session, question, looser)) == 200:
            again = _post(session, question, structured)
            if _code(again) == 200 or not isinstance(again, httpx.Response):
                return again
            said = _without(session.key, again.text)[:_SHOWN]
            raise UsageError(
                f'the judge at {session.settings.base_url} does not take structured = "{structured}": '
                f"{again.status_code} {said}",
                f'set structured = "{looser}" in the table of this judge: the endpoint answers that, and answers are '
                "checked in any case",
            )
    return answer


def _code(answer: httpx.Response | httpx.TransportError) -> int | None:
    return answer.status_code if isinstance(answer, httpx.Response) else None


def _is_transient(answer: httpx.Response | httpx.TransportError) -> bool:
    return isinstance(answer, httpx.TransportError) or answer.status_code in _TRANSIENT


def _reply(answer: httpx.Response | httpx.TransportError, settings: Judge, key: str) -> Reply:
    if isinstance(answer, httpx.TimeoutException):
        return Reply(
            None, "timeout", f"no answer within {settings.timeout_seconds:g} s, asked {settings.retries + 1} times"
        )
    if isinstance(answer, httpx.TransportError):
        raise StorageError(
            f"the judge at {settings.base_url} cannot be reached: {_without(key, str(answer))}",
            "start the endpoint and run the same command again: it resumes",
        )
    said = _without(key, answer.text)[:_SHOWN]
    _raise_if_refused(answer.status_code, said, settings, key)
    if answer.status_code != 200:
        return Reply(None, "crash", f"{answer.status_code} {said}")
    try:
        choice = answer.json()["choices"][0]
        text, finish_reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return Reply(None, "crash", f"no chat completion: {said}")
    if finish_reason == "length":
        return Reply(None, "unparsable", f"the judge's answer is cut at max_tokens = {settings.max_tokens}")
    if not isinstance(text, str) or not text.strip():
        return Reply(None, "unparsable", "the judge's answer is empty")
    return Reply(_without(key, text.encode(errors="replace").decode()))  # half of a character fits into no file


def _raise_if_refused(code: int, said: str, settings: Judge, key: str) -> None:
    if code in _REFUSED:
        name = settings.api_key_env
        sent = f"with the key in {name}" if key else f"without a key ({name} is not set)"
        raise UsageError(
            f"the judge at {settings.base_url} refuses model '{settings.model}' {sent}: {code} {said}",
            f"check base_url and model, and put the key into the environment variable {name}",
        )
    if code == 429:
        raise StorageError(
            f"the judge at {settings.base_url} takes no more requests: 429 {said}",
            "lower concurrency or raise retries, and run the same command again: it resumes",
        )


def _without(key: str, text: str) -> str:
    """The text without the key, which an endpoint may repeat in what it says."""
    return text.replace(key, "***") if key else text


def _limits(settings: Judge) -> httpx.Limits:
    return httpx.Limits(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency)
