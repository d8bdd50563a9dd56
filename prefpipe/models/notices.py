"""What a user should know of a chat template before a run: text that it adds to prompts, the end of an answer."""

from functools import partial

from prefpipe import log
from prefpipe.models import dialogue, template
from prefpipe.models.chat import Chat
from prefpipe.models.encoding import encode, render


def notices(chat: Chat) -> list[str]:
    """A line for each text that the template adds to every prompt: a date, a default system message."""
    lines: list[str] = []
    if template.prints_date(chat.template):
        lines.append(f"the chat template prints a date, {chat.date}: --template-date fixes it for later runs")
    added = dialogue.default_system(partial(render, chat), chat.control_tokens)
    if added:
        lines.append(f"the chat template adds a system message of its own: {added!r}")
    return lines


def check_ends(chat: Chat) -> None:
    """Log a warning, with a setting to change, when the template ends answers without a token that ends a
    completion."""
    tail = dialogue.after_answer(partial(render, chat))
    if tail is None or chat.eos_token_ids & set(encode(chat, tail)):
        return
    known = ", ".join(repr(chat.tokenizer.id_to_token(i) or f"id {i}") for i in sorted(chat.eos_token_ids))
    written = [token for token in chat.control_tokens if token in tail]
    if written:
        token = min(written, key=tail.find)
        log.warn(
            f"the chat template ends an answer with {token!r}, which is no end-of-sequence token of the model (it has "
            f"{known}): completions go on behind it; add {chat.tokenizer.token_to_id(token)} to eos_token_id in "
            f"generation_config.json, or sample with --stop '{token}'"
        )
        return
    later = dialogue.after_answer(partial(render, chat), more=True) or ""
    ends = [token for token in chat.control_tokens if token in later]
    only = f" unless another turn follows ({min(ends, key=later.find)!r})" if ends else ""
    log.warn(
        f"the chat template writes no end-of-sequence token behind an answer{only}; the model has {known}: it does "
        "not learn to stop from such rows; pass a --chat-template that ends every answer with one"
    )
