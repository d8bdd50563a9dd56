"""Questions to a language model behind an OpenAI-compatible endpoint: many at once, with retries.

The API key comes from the environment. It is cut out of every text that leaves this module.
"""

import asyncio
import json
import os
import re
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from prefpipe import log
from prefpipe.config.judge import Judge
from prefpipe.errors import StorageError, UsageError
from prefpipe.rewards import api_key
from prefpipe.rewards.api_key import ApiKey
from prefpipe.schemas import Message

_TRANSIENT = (408, 409, 429, 500, 502, 503, 504)  # the same request may succeed later
_REFUSED = (401, 403, 404)  # it never will
_FORMAT_UNKNOWN = (400, 406, 415, 422, 500, 501)  # what endpoints answer to a response_format that they do not know
_LOOSER = {"json_schema": ("json_object", "none"), "json_object": ("none",), "none": ()}
_LONGEST_PAUSE = 60.0
_SHOWN = 300
_MOST_BYTES = 16 << 20  # of an answer, unpacked
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")  # in small or capital letters
_CERTIFICATES = ("ssl_cert_file", "ssl_cert_dir")


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
class _Answer:
    """What came back: a status with its text, or why nothing did (status 0, with the reason). The key is cut out."""

    status: int
    text: str
    retry_after: str | None = None
    failure: Literal["", "late", "broken", "unreachable"] = ""


@dataclass(frozen=True)
class _Session:
    """What the questions of one call share. `accepted` is set once the endpoint has answered one in our format."""

    client: httpx.AsyncClient
    settings: Judge
    key: ApiKey
    turns: asyncio.Semaphore
    accepted: asyncio.Event = field(default_factory=asyncio.Event)


class _Bearer(httpx.Auth):
    """Writes the key into the header of a request, and nowhere else."""

    def __init__(self, key: ApiKey) -> None:
        self._key = key

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response]:
        request.headers["Authorization"] = f"Bearer {self._key.get_secret_value()}"
        yield request


def ask_all(settings: Judge, questions: Sequence[Question]) -> list[Reply]:
    """Replies in the order of the questions.

    A question that times out or fails after the last retry has a reply without a text. Raises UsageError when the
    endpoint refuses the request (401, 403, 404) or the format of `structured`, and for an address, a proxy or
    certificates that cannot be used; StorageError when the endpoint cannot be reached or stays overloaded (429): the
    run then stops and can resume, instead of filling with missing rewards.
    """
    key = api_key.read(settings.api_key_env)
    # In another thread: what the handler of a signal raises inside of a loop, asyncio may keep to itself.
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner, ThreadPoolExecutor(1) as pool:
        loop = runner.get_loop()
        asking = loop.create_task(_ask_all(settings, questions, key))
        try:
            return pool.submit(loop.run_until_complete, asking).result()
        finally:
            loop.call_soon_threadsafe(asking.cancel)


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


async def _ask_all(settings: Judge, questions: Sequence[Question], key: ApiKey) -> list[Reply]:
    async with _client(settings, key) as client:
        session = _Session(client, settings, key, asyncio.Semaphore(settings.concurrency))
        asked = [asyncio.create_task(_ask(session, question)) for question in questions]
        reached = log.remarks("judge", len(asked), "questions answered")
        try:
            for count, task in enumerate(asyncio.as_completed(asked), 1):
                await task
                reached(count)
            return [task.result() for task in asked]
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)


def _client(settings: Judge, key: ApiKey) -> httpx.AsyncClient:
    """A client without time limits: `_post` has one for everything. It follows no redirect."""
    limits = httpx.Limits(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency)
    try:
        httpx.URL(settings.base_url)
    except httpx.InvalidURL as error:
        raise _no_address(settings, error) from None
    try:
        return httpx.AsyncClient(timeout=None, limits=limits, auth=_Bearer(key) if key else None)
    except OSError:
        raise UsageError(f"the certificates that {_set(_CERTIFICATES)} names cannot be read", "mend it") from None
    except (ValueError, ImportError, httpx.InvalidURL):
        raise UsageError(
            f"the address of the proxy in {_set(_PROXIES)} cannot be used",
            "write it as http://HOST:PORT (socks5:// needs the package socksio); NO_PROXY takes names of hosts",
        ) from None


def _set(variables: Sequence[str]) -> str:
    """Those of some environment variables that are set, as a list for a sentence."""
    return ", ".join(name for name in os.environ if name.lower() in variables)


async def _ask(session: _Session, question: Question) -> Reply:
    settings = session.settings
    async with session.turns:
        answer = await _post(session, question, settings.structured)
        for attempt in range(settings.retries):
            if not _is_transient(answer):
                break
            await asyncio.sleep(pause(settings, attempt, answer.retry_after))
            answer = await _post(session, question, settings.structured)
        return _reply(await _check_format(session, question, answer), settings, session.key)


async def _post(session: _Session, question: Question, structured: str) -> _Answer:
    """The whole answer, unpacked, or why there is none."""
    settings = session.settings
    is_connected = False

    async def follow(event: str, _details: object) -> None:
        nonlocal is_connected
        is_connected = is_connected or event.endswith("send_request_headers.started")

    try:
        async with asyncio.timeout(settings.timeout_seconds):
            return await _receive(session, body(settings, question, structured), follow)
    except TimeoutError:
        if is_connected:
            return _Answer(0, "no answer in time", failure="late")
        return _Answer(0, f"no connection within {settings.timeout_seconds:g} s", failure="unreachable")
    except httpx.TransportError as error:
        is_reached = is_connected and not isinstance(error, httpx.ProxyError)
        said = session.key.cut_out_of(str(error)) or type(error).__name__
        return _Answer(0, said, failure="broken" if is_reached else "unreachable")
    except httpx.DecodingError as error:
        return _Answer(502, f"an answer that cannot be unpacked: {error}")
    except (httpx.InvalidURL, UnicodeError) as error:  # UnicodeError: parts of a host that are empty or too long
        raise _no_address(settings, error) from None


async def _receive(session: _Session, request: dict[str, Any], follow: Callable[[str, object], Any]) -> _Answer:
    """What the endpoint answers to a request; `follow` is called with the name of each step on the way."""
    async with session.client.stream(
        "POST",
        f"{session.settings.base_url}/chat/completions",
        content=json.dumps(request).encode(),
        headers={"content-type": "application/json"},
        extensions={"trace": follow},
    ) as answer:
        content = bytearray()
        async for chunk in answer.aiter_bytes():
            content += chunk
            if len(content) > _MOST_BYTES:
                return _Answer(502, f"an answer of more than {_MOST_BYTES:,} bytes")
        said = session.key.cut_out_of(content.decode(errors="replace"))
        return _Answer(answer.status_code, said, answer.headers.get("retry-after"))


def _no_address(settings: Judge, error: Exception) -> UsageError:
    return UsageError(f"base_url = '{settings.base_url}' is no address: {error}", "mend base_url")


async def _check_format(session: _Session, question: Question, answer: _Answer) -> _Answer:
    """The answer. Raises UsageError when the endpoint does not know the format of `structured`.

    Endpoints report that in different words, so it is found by experiment. As long as no question was accepted, one
    that fails is asked in looser formats. If one of these succeeds and the question fails once more as before, the
    format is the reason.
    """
    structured = session.settings.structured
    if answer.status == 200:
        session.accepted.set()
    if answer.status not in _FORMAT_UNKNOWN or session.accepted.is_set():
        return answer
    for looser in _LOOSER[structured]:
        if (await _post(session, question, looser)).status == 200:
            again = await _post(session, question, structured)
            if again.status == 200 or again.failure:
                return again
            said = again.text[:_SHOWN]
            raise UsageError(
                f'the judge at {session.settings.base_url} does not take structured = "{structured}": '
                f"{again.status} {said}",
                f'set structured = "{looser}" in the table of this judge: the endpoint answers that, and answers are '
                "checked in any case",
            )
    return answer


def _is_transient(answer: _Answer) -> bool:
    return bool(answer.failure) or answer.status in _TRANSIENT


def _reply(answer: _Answer, settings: Judge, key: ApiKey) -> Reply:
    said = answer.text[:_SHOWN]
    if answer.failure == "late":
        return Reply(
            None, "timeout", f"no answer within {settings.timeout_seconds:g} s, asked {settings.retries + 1} times"
        )
    if answer.failure == "broken":
        return Reply(None, "crash", f"the answer breaks off: {said}")
    if answer.failure == "unreachable":
        through = f", and NO_PROXY if {_set(_PROXIES)} is not meant for it" * bool(_set(_PROXIES))
        raise StorageError(
            f"the judge at {settings.base_url} cannot be reached: {said}",
            f"start the endpoint, check base_url{through}; the same command resumes",
        )
    _raise_if_refused(answer.status, said, settings, key)
    if answer.status != 200:
        return Reply(None, "crash", f"{answer.status} {said}")
    try:
        choice = json.loads(answer.text)["choices"][0]
        text, finish_reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return Reply(None, "crash", f"no chat completion: {said}")
    if finish_reason == "length":
        return Reply(None, "unparsable", f"the judge's answer is cut at max_tokens = {settings.max_tokens}")
    if not isinstance(text, str) or not text.strip():
        return Reply(None, "unparsable", "the judge's answer is empty")
    return Reply(key.cut_out_of(text.encode(errors="replace").decode()))  # half of a character fits into no file


def _raise_if_refused(code: int, said: str, settings: Judge, key: ApiKey) -> None:
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
