"""Questions to a language model behind an OpenAI-compatible endpoint: many at once, with retries."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prefpipe import api_key, http, log
from prefpipe.config.judge import Judge
from prefpipe.errors import StorageError, UsageError
from prefpipe.http import Answer, Link
from prefpipe.schemas import Message

_REFUSED = (401, 403, 404)  # statuses with which a repeated request would fail again
_FORMAT_UNKNOWN = (400, 406, 415, 422, 500, 501)  # statuses of endpoints that do not know the response_format
_LOOSER = {"json_schema": ("json_object", "none"), "json_object": ("none",), "none": ()}


@dataclass(frozen=True)
class Question:
    """The messages to the judge, and the JSON Schema of its answer."""

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
    """State that the questions of one call share. `accepted`: the endpoint has answered a question in our format."""

    link: Link
    settings: Judge
    turns: asyncio.Semaphore
    accepted: asyncio.Event = field(default_factory=asyncio.Event)


def ask_all(settings: Judge, questions: Sequence[Question]) -> list[Reply]:
    """Replies in the order of the questions.

    A question that times out or fails after the last retry has a reply without text. Raises UsageError when the
    endpoint refuses the request (401, 403, 404) or the format of `structured`, and for an address, a proxy or
    certificates that cannot be used. Raises StorageError when the endpoint cannot be reached or stays overloaded (429):
    the run then stops and can resume, where it would otherwise fill with missing rewards.
    """
    key = api_key.read(settings.api_key_env)
    with http.loop_in_thread() as loop:
        return asyncio.run_coroutine_threadsafe(_ask_all(settings, questions, key), loop).result()


def body(settings: Judge, question: Question, structured: str) -> dict[str, Any]:
    """The request as JSON. `structured` is the setting that says how the endpoint is held to JSON."""
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


async def _ask_all(settings: Judge, questions: Sequence[Question], key: api_key.ApiKey) -> list[Reply]:
    link = http.link([settings.base_url], "base_url", key, settings.timeout_seconds, settings.concurrency)
    async with link.client:
        session = _Session(link, settings, asyncio.Semaphore(settings.concurrency))
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


async def _ask(session: _Session, question: Question) -> Reply:
    settings = session.settings
    async with session.turns:
        answer = await _post(session, question, settings.structured)
        for attempt in range(settings.retries):
            if not answer.is_transient:
                break
            await asyncio.sleep(http.pause(settings.backoff_seconds, attempt, answer.retry_after))
            answer = await _post(session, question, settings.structured)
        return _reply(await _check_format(session, question, answer), session)


async def _post(session: _Session, question: Question, structured: str) -> Answer:
    address = f"{session.settings.base_url}/chat/completions"
    return await http.ask(session.link, address, body(session.settings, question, structured))


async def _check_format(session: _Session, question: Question, answer: Answer) -> Answer:
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
            said = again.shown
            raise UsageError(
                f'the judge at {session.settings.base_url} does not take structured = "{structured}": '
                f"{again.status} {said}",
                f'set structured = "{looser}" in the table of this judge: the endpoint answers that, and answers are '
                "checked in any case",
            )
    return answer


def _reply(answer: Answer, session: _Session) -> Reply:
    settings, key, said = session.settings, session.link.key, answer.shown
    if answer.failure == "late":
        return Reply(
            None, "timeout", f"no answer within {settings.timeout_seconds:g} s, asked {settings.retries + 1} times"
        )
    if answer.failure == "broken":
        return Reply(None, "crash", f"the answer breaks off: {said}")
    if answer.failure == "unreachable":
        raise StorageError(
            f"the judge at {settings.base_url} cannot be reached: {said}",
            f"start the endpoint, check base_url{http.proxy_hint()}; the same command resumes",
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
    return Reply(key.cut_out_of(text.encode(errors="replace").decode()))  # a lone surrogate cannot be written to a file


def _raise_if_refused(code: int, said: str, settings: Judge, key: api_key.ApiKey) -> None:
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
