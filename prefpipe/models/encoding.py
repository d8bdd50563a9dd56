"""The token ids of a conversation, and whether they hold all of its text.

A chat template is applied once, when a prompt enters the pipeline. From then on token ids travel.
"""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prefpipe.config.engine import EngineConfig
from prefpipe.config.rewards import RewardModel
from prefpipe.config.train import TrainConfig
from prefpipe.errors import RowFault
from prefpipe.models import escape, template, turns
from prefpipe.models.chat import Chat
from prefpipe.schemas import Message

_CHARACTERS_PER_TOKEN = 16  # few texts have more on average; for those the longest token is looked up
_SYSTEM = ("system", "developer")
ASKING = ("user", "tool", "function", "ipython", "observation")  # roles that the assistant answers


class Rules(NamedTuple):
    """What happens to a row with text that a tokenizer or a template would change.

    control_tokens: text that spells a control token: "drop" the row, "escape" (tokenise it as plain text) or "allow"
    template_changes: text that the chat template leaves out, and a prompt that reads otherwise when an answer follows:
        "drop" the row or "allow"
    """

    control_tokens: str = "drop"
    template_changes: str = "drop"

    @classmethod
    def of(cls, settings: EngineConfig | TrainConfig | RewardModel) -> "Rules":
        """The rules that are set in the settings of a command or of a reward model."""
        return cls(settings.special_tokens_in_prompts, settings.template_changes)


DROP = Rules()


class Rendered(NamedTuple):
    """The text of a conversation. Marks stand for control tokens that its messages spell. `spans` are the parts that
    the template marks as written by the assistant (`{% generation %}`)."""

    text: str
    tokens: Sequence[str] = ()
    spans: Sequence[template.Span] = ()

    @property
    def plain(self) -> str:
        """The text without marks."""
        return escape.unmarked(self.text, self.tokens) if self.tokens else self.text

    @property
    def plain_spans(self) -> Sequence[template.Span]:
        """The spans in the text without marks."""
        if not self.tokens:
            return self.spans
        return [(self._plain_length(start), self._plain_length(end)) for start, end in self.spans]

    def _plain_length(self, end: int) -> int:
        return len(escape.unmarked(self.text[:end], self.tokens))


def encode_prompt(
    chat: Chat, messages: Sequence[Message], inputs: str | None = None, *, max_tokens: int, rules: Rules
) -> list[int]:
    """The token ids of a prompt, up to where the answer begins. Raises RowFault for a prompt that cannot be used.

    `inputs` is JSON of further inputs of the template, as in the column template_inputs.
    """
    source = prompt_text(chat, messages, inputs, rules)
    check_characters(chat, source, max_tokens)
    ids = encode_rendered(chat, source)
    check_length(ids, max_tokens)
    return ids


def prompt_text(chat: Chat, messages: Sequence[Message], inputs: str | None, rules: Rules) -> Rendered:
    """A prompt as text, up to where the answer begins. Raises RowFault for a prompt that cannot be used."""
    _check_messages(messages)
    return rendered(chat, messages, inputs, rules, add_generation_prompt=True)


def check_characters(chat: Chat, source: Rendered, max_tokens: int) -> None:
    """Raise RowFault for a text that is too long for `max_tokens` whatever its tokens are. This comes before
    tokenising, which takes 120 times the memory of the text."""
    count = len(source.text)
    if count > _CHARACTERS_PER_TOKEN * max_tokens and count > chat.longest_token * max_tokens:
        raise RowFault("too_long", f"{count} characters, the most is {max_tokens} tokens")


def check_length(prompt_ids: Sequence[int], max_tokens: int) -> None:
    """Raise RowFault for a prompt of more than `max_tokens` tokens."""
    if len(prompt_ids) > max_tokens:
        raise RowFault("too_long", f"{len(prompt_ids)} tokens in the prompt, the most is {max_tokens}")


def rendered(
    chat: Chat, messages: Sequence[Message], inputs: str | None, rules: Rules, *, add_generation_prompt: bool
) -> Rendered:
    """The chat template applied to a conversation. Raises RowFault where the template refuses it or `rules` forbid
    it."""
    if rules.control_tokens == "drop":
        check_control_tokens(chat, messages, inputs)
    tokens: list[str] = []
    if rules.control_tokens == "escape":
        messages, inputs, tokens = _marked(chat, messages, inputs)
    given = json.loads(inputs) if inputs else template.NO_INPUTS
    text, spans = _render(chat, messages, given, add_generation_prompt=add_generation_prompt)
    if rules.template_changes == "drop":
        _check_text(messages, given, text)
    return Rendered(text, tokens, spans)


def _marked(
    chat: Chat, messages: Sequence[Message], inputs: str | None
) -> tuple[Sequence[Message], str | None, list[str]]:
    """Messages and inputs with marks in place of the control tokens that they spell, and those tokens: see `escape`."""
    parts = [(message, part) for message in messages for part in ("content", "extra")]
    spelled = [*(_spelled(chat, *part) for part in parts), _in_prompts(chat, inputs or "")]
    if not any(spelled):
        return messages, inputs, []
    texts, tokens = escape.mark([*(message.get(part, "") for message, part in parts), inputs or ""], spelled)
    pairs = zip(messages, texts[:-1:2], texts[1::2], strict=True)
    marked = [
        Message(role=m["role"], content=content, extra=extra) if extra else Message(role=m["role"], content=content)
        for m, content, extra in pairs
    ]
    return marked, texts[-1] or None, tokens


def encode_rendered(chat: Chat, source: Rendered) -> list[int]:
    """Token ids of a rendered conversation. Raises RowFault where a control token cannot be written as plain text."""
    if source.tokens:
        return escape.encode_marked(chat.tokenizer, source.text, source.tokens)[0]
    return encode(chat, source.text)


def encode_with_mask(chat: Chat, source: Rendered) -> tuple[list[int], list[bool]]:
    """Token ids as in `encode_rendered`, and for each id whether it has a character that the assistant wrote."""
    if source.tokens:
        ids, offsets = escape.encode_marked(chat.tokenizer, source.text, source.tokens)
    else:
        encoding = chat.tokenizer.encode(source.text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
    mask = [False] * len(ids)
    ends = [end for _, end in offsets]
    for start, end in source.plain_spans:
        first = bisect_right(ends, start)
        behind = bisect_left(offsets, (end, 0), lo=first)
        mask[first:behind] = [True] * (behind - first)
    return ids, mask


def check_control_tokens(chat: Chat, messages: Sequence[Message], inputs: str | None = None) -> None:
    """Raise RowFault when a message or another input of the template spells a control token, which would become one."""
    for message in messages:
        spelled = _spelled(chat, message, "content") or ("extra" in message and _spelled(chat, message, "extra"))
        if spelled:
            raise RowFault("control_tokens", f"the {message['role']} message spells {spelled[0]}")
    if inputs and (spelled := _in_prompts(chat, inputs)):
        raise RowFault("control_tokens", f"the tools or documents spell {spelled[0]}")


def render(
    chat: Chat,
    messages: Sequence[Message],
    inputs: Mapping[str, Any] = template.NO_INPUTS,
    *,
    add_generation_prompt: bool,
) -> str:
    """The chat template applied to messages. Raises RowFault when the template refuses them."""
    return _render(chat, messages, inputs, add_generation_prompt=add_generation_prompt)[0]


def _render(
    chat: Chat, messages: Sequence[Message], inputs: Mapping[str, Any], *, add_generation_prompt: bool
) -> tuple[str, list[template.Span]]:
    if chat.template_kwargs:
        inputs = {**inputs, "chat_template_kwargs": {**chat.template_kwargs, **inputs.get("chat_template_kwargs", {})}}
    given = turns.for_template(messages, chat.shape)
    return template.render_with_spans(
        chat.template, chat.date, given, chat.named_tokens, inputs, add_generation_prompt=add_generation_prompt
    )


def encode(chat: Chat, text: str) -> list[int]:
    """Token ids of rendered text. The tokenizer adds none: the template has written every control token already."""
    encodings = chat.tokenizer.encode_batch_fast([text], add_special_tokens=False)  # `encode` also computes offsets
    return encodings[0].ids


def _spelled(chat: Chat, message: Message, part: str) -> list[str]:
    """The control tokens that a part of a message spells. Tokens that open turns of the user are words in an answer."""
    tokens = _in_prompts(chat, message.get(part, ""))
    if message["role"] == "assistant":
        tokens = [token for token in tokens if token in chat.answer_control_tokens]
    return tokens


def _in_prompts(chat: Chat, text: str) -> list[str]:
    return [token for token in chat.control_tokens if token in text]


def _check_text(messages: Sequence[Message], inputs: Mapping[str, Any], text: str) -> None:
    lost = turns.lost(messages, text)
    if lost is not None:
        place, what = lost
        raise RowFault(
            "template_changes", f"the chat template leaves out {what} of message {place} ({messages[place]['role']})"
        )
    left_out = turns.lost_input(inputs, text) if inputs else None
    if left_out is not None:
        raise RowFault("template_changes", f"the chat template leaves out the {left_out}")


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages or not any(m["content"].strip() or "extra" in m for m in messages):
        raise RowFault("empty", "no message with text")
    roles = [m["role"] for m in messages]
    unknown = next((r for r in roles if r not in (*_SYSTEM, *ASKING, "assistant")), None)
    if unknown is not None:
        raise RowFault("bad_roles", f"unknown role {unknown!r}")
    if any(role in _SYSTEM for role in roles[1:]) or roles[-1] not in ASKING:
        raise RowFault("bad_roles", f"a prompt ends with a user message, system comes first; roles are {roles}")
