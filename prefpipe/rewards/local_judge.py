"""A judge that runs in an engine on this machine, from a model directory."""

import contextlib
import functools
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefpipe import engines, log, machine
from prefpipe.config.judge import Judge
from prefpipe.engines.base import Engine, EngineSettings, Query, Response
from prefpipe.errors import RowFault, UsageError
from prefpipe.ids import ids_digest, sample_seed
from prefpipe.models.chat import Chat, load_chat
from prefpipe.models.encoding import Rules, encode_prompt, render
from prefpipe.models.policy import context_length, resolve
from prefpipe.rewards.endpoint import Question, Reply
from prefpipe.schemas import Message

_FRAME = 40  # tokens that keys, punctuation and verdict of an answer take at most
_OBJECT: dict[str, Any] = {"type": "object"}


def inputs(settings: Judge) -> dict[str, str]:
    """Digests of weights, tokenizer and chat template of the judge. Its path has no part."""
    policy = resolve(_name(settings))
    return {"model": policy.id, **load_chat(policy.directory).digests}


def ask_in_engine(settings: Judge) -> Callable[[Judge, Sequence[Question]], list[Reply]]:
    """A function that asks the model. The engine starts at its first call and ends when the function is
    garbage-collected.

    vLLM answers under the schema of the question (`structured`); transformers is asked for JSON in words only. Control
    tokens in the text of a completion reach the judge as plain text. A question gets no verdict when it exceeds
    `max_prompt_tokens`, or when `max_tokens` do not fit behind it into the model's context. Raises UsageError when the
    context has no room for any question.
    """
    directory = resolve(_name(settings)).directory
    chat = load_chat(directory)
    longest = _longest_question(settings, directory)
    has_system = takes_system(chat)
    open_engines = contextlib.ExitStack()
    start = functools.cache(lambda: open_engines.enter_context(_start(settings, directory, chat, longest)))

    def ask(_settings: Judge, questions: Sequence[Question]) -> list[Reply]:
        replies: dict[int, Reply] = {}
        queries: list[Query] = []
        for index, question in enumerate(questions):
            try:
                messages = question.messages if has_system else in_one(question.messages)
                ids = encode_prompt(chat, messages, max_tokens=longest, rules=Rules("escape"))
                queries.append(_query(settings, ids, index, question))
            except RowFault as fault:
                replies[index] = Reply(
                    None, "unparsable", f"the question cannot be asked: {fault.reason}: {fault.detail}"
                )
        if queries:
            reached = log.remarks("judge", len(questions), "questions answered")
            for query, response in start().respond(queries):
                replies[int(query.query_id)] = _reply(settings, chat, response)
                reached(len(replies))
        return [replies[index] for index in range(len(questions))]

    weakref.finalize(ask, open_engines.close)
    return ask


def shape(settings: Judge, schema: dict[str, Any]) -> dict[str, Any] | None:
    """The schema that the engine holds the answer to; None for no schema.

    Free texts get a maximal length, so that the verdict behind them comes within `max_tokens`. A character counts as
    two tokens, which only rare scripts exceed.
    """
    if settings.structured == "none":
        return None
    if settings.structured == "json_object":
        return _OBJECT
    most = max(1, (settings.max_tokens - _FRAME) // 2)
    bounded = {
        name: {**value, "maxLength": most} if value == {"type": "string"} else value
        for name, value in schema["properties"].items()
    }
    return {**schema, "properties": bounded}


def takes_system(chat: Chat) -> bool:
    """Whether the chat template takes a system message. That of Gemma 2 raises."""
    try:
        render(chat, [Message(role=r, content="x") for r in ("system", "user")], add_generation_prompt=True)
    except RowFault:
        return False
    return True


def in_one(messages: Sequence[Message]) -> list[Message]:
    """System and user message as one user message."""
    return [Message(role="user", content="\n\n".join(m["content"] for m in messages))]


def _query(settings: Judge, token_ids: list[int], index: int, question: Question) -> Query:
    seed = sample_seed(0, ids_digest(token_ids, ()), 0)
    return Query(str(index), token_ids, seed, settings.temperature, shape(settings, question.schema))


def _reply(settings: Judge, chat: Chat, response: Response) -> Reply:
    if response.finish_reason == "length":
        return Reply(None, "unparsable", f"the judge's answer is cut at max_tokens = {settings.max_tokens}")
    return Reply(chat.decode(response.token_ids))


def _longest_question(settings: Judge, directory: Path) -> int:
    """max_prompt_tokens, or less when question, answer and one more token would exceed the context of the model."""
    context = context_length(directory)
    longest = settings.max_prompt_tokens
    if context is not None:
        longest = min(longest, context - settings.max_tokens - 1)
    if longest < 1:
        raise UsageError(
            f"judge {directory.name} has a context of {context} tokens: no room for a question beside max_tokens = "
            f"{settings.max_tokens}",
            "lower max_tokens of the judge, or take a model with a longer context",
        )
    return longest


def _start(settings: Judge, directory: Path, chat: Chat, longest: int) -> Engine:
    wanted = {"json_schema": "JSON Schema", "json_object": "JSON", "none": "in words only"}[settings.structured]
    dtype = machine.named(settings.dtype)
    log.info(f"starting engine {settings.engine} for the judge ({directory.name}, {dtype}, {wanted})")
    return engines.load(
        settings.engine,
        EngineSettings.of(
            settings,
            resolve(_name(settings)),
            chat,
            dtype=dtype,
            top_p=1.0,
            max_model_len=longest + settings.max_tokens,
            max_num_seqs=settings.concurrency,
        ),
    )


def _name(settings: Judge) -> str:
    if settings.model == "default":
        raise UsageError("a judge in an engine needs a model", "set model to a directory or a hub id")
    return settings.model
