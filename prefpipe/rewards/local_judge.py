"""Questions to a judge that runs in an engine on this machine: a model directory instead of an endpoint."""

import contextlib
import functools
import json
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from prefpipe import chat as chats
from prefpipe import engines, log, models
from prefpipe.chat import RowFault, encode_prompt
from prefpipe.config.rewards import Judge
from prefpipe.engines.base import Draw, Engine, EngineSettings, Request, Sample
from prefpipe.errors import UsageError
from prefpipe.rewards.endpoint import Question, Reply
from prefpipe.schemas import Message

_KV_CACHE_MIB = 512  # on CPU; a GPU takes its free memory


def inputs(settings: Judge) -> dict[str, str]:
    """Weights, tokenizer and chat template of the judge, by content, in place of the path that names it."""
    policy = models.resolve(_name(settings))
    return {"model": policy.id, **chats.load(policy.directory).digests}


def ask_in_engine(settings: Judge) -> Callable[[Judge, Sequence[Question]], list[Reply]]:
    """A function that asks the model; the engine starts at its first call and ends with it.

    Engines have no structured output here: the shape is asked for in words and the verdict is checked as always. One
    engine with vLLM at a time: rate in a run of its own.
    """
    directory = models.resolve(_name(settings)).directory
    chat = chats.load(directory)
    open_engines = contextlib.ExitStack()
    start = functools.cache(lambda: open_engines.enter_context(_start(settings, directory, chat)))

    def ask(_settings: Judge, questions: Sequence[Question]) -> list[Reply]:
        replies: dict[int, Reply] = {}
        requests: list[Request] = []
        for index, question in enumerate(questions):
            try:
                requests.append(_request(settings, chat, index, question))
            except RowFault as fault:
                replies[index] = Reply(
                    None, "unparsable", f"the question cannot be asked: {fault.reason}: {fault.detail}"
                )
        if requests:
            for request, (sample,) in start().generate(requests):
                replies[int(request.prompt_id)] = _reply(settings, chat, sample)
        return [replies[index] for index in range(len(questions))]

    weakref.finalize(ask, open_engines.close)
    return ask


def _request(settings: Judge, chat: chats.Chat, index: int, question: Question) -> Request:
    messages = [Message(role=m["role"], content=m["content"]) for m in question.messages]
    ids = encode_prompt(chat, messages, max_tokens=settings.max_prompt_tokens, control_tokens="drop")
    return Request(str(index), ids, (Draw(0, 0, settings.temperature),))


def _reply(settings: Judge, chat: chats.Chat, sample: Sample) -> Reply:
    if sample.finish_reason == "length":
        return Reply(None, "unparsable", f"the judge's answer is cut at max_tokens = {settings.max_tokens}")
    return Reply(chat.decode(sample.token_ids))


def _start(settings: Judge, directory: Any, chat: chats.Chat) -> Engine:
    log.info(f"starting engine {settings.engine} for the judge ({directory.name}, {settings.dtype})")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    longest = settings.max_prompt_tokens + settings.max_tokens
    return engines.load(
        settings.engine,
        EngineSettings(
            policy=models.resolve(_name(settings)), chat=chat, dtype=settings.dtype, top_p=1.0,
            max_tokens=settings.max_tokens, max_model_len=min(longest, config.get("max_position_embeddings", longest)),
            max_num_seqs=settings.concurrency, kv_cache_mib=_KV_CACHE_MIB,
        ),
    )  # fmt: skip


def _name(settings: Judge) -> str:
    if settings.model == "default":
        raise UsageError("a judge in an engine needs a model", "set model to a directory or a hub id")
    return settings.model
