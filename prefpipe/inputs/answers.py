"""An answer as token ids: cut out of its rendering behind the prompt, with the tokens of it that are scored.

Of an answer of one turn every token is scored. One of several turns also holds what tools and users say: there the
`{% generation %}` marks of the chat template decide.
"""

from typing import NamedTuple

from prefpipe.errors import RowFault
from prefpipe.models import template
from prefpipe.models.chat import Chat
from prefpipe.models.encoding import Rendered, encode_rendered, encode_with_mask
from prefpipe.models.thinking import Said
from prefpipe.schemas import Message, Messages


class AnswerIds(NamedTuple):
    """The token ids of an answer. `mask` says which of them are scored; None: all."""

    ids: list[int]
    mask: list[bool] | None = None

    def start(self, count: int) -> "AnswerIds":
        """The first `count` tokens, up to the last scored one of them. Raises RowFault where none is."""
        if self.mask is None:
            return AnswerIds(self.ids[:count])
        end = _behind_last(self.mask[:count])
        if not end:
            raise RowFault("too_long", f"none of the first {count} tokens of the answer is the assistant's")
        return AnswerIds(self.ids[:end], self.mask[:end])


def check_marks(chat: Chat, turns: Messages) -> None:
    """Raise RowFault for an answer of several turns and a template that does not mark those of the assistant."""
    if len(turns) > 1 and not template.marks_assistant(chat.template):
        raise _no_marks(turns)


def encode(chat: Chat, source: Rendered, turns: Messages) -> AnswerIds:
    """A rendering of a prompt and an answer of these turns as token ids. Raises RowFault where a control token cannot
    be written as plain text."""
    return AnswerIds(encode_rendered(chat, source)) if len(turns) == 1 else AnswerIds(*encode_with_mask(chat, source))


def behind_prompt(chat: Chat, whole: AnswerIds, prompt_length: int, turns: Messages) -> AnswerIds:
    """The ids behind the prompt, up to the end-of-sequence token of the last turn, which is scored whatever the marks
    say. What the template adds behind it is no part of the answer. Raises RowFault for an answer without text, and for
    one of several turns without a mark."""
    ids, mask = whole.ids[prompt_length:], None if whole.mask is None else whole.mask[prompt_length:]
    if mask is not None and not any(mask):
        raise _no_marks(turns)
    first = 0 if mask is None else last_turn(mask)  # an end-of-sequence token in front of it ends another turn
    last = max((i for i in range(first, len(ids)) if ids[i] in chat.eos_token_ids), default=None)
    while last and ids[last - 1] in chat.eos_token_ids:
        last -= 1
    if mask is not None:
        if last is not None:
            mask[last] = True
        mask = mask[: last + 1 if last is not None else _behind_last(mask)]
        ids = ids[: len(mask)]
    elif last is not None:
        ids = ids[: last + 1]
    if all(i in chat.eos_token_ids for i in ids):
        raise RowFault("empty", "a completion without text")
    return AnswerIds(ids, mask)


def read(chat: Chat, answer: AnswerIds, turns: Messages, *, cut: bool) -> tuple[Said, Messages]:
    """What an answer says, parted into its last answer and what stands before it (reasoning, and of several turns the
    earlier ones), and its turns. One that was `cut` is a single turn, of what its token ids say."""
    begin = 0 if answer.mask is None else last_turn(answer.mask)
    ids = answer.ids[begin:]
    said = chat.said(ids, chat.decode(ids) if cut or "extra" in turns[-1] else turns[-1]["content"])
    if begin:
        before = chat.decode(answer.ids[:begin]) + (said.thinking or "")
        said = Said(said.text, before, begin + (said.thinking_tokens or 0))
    return said, [Message(role="assistant", content=chat.decode(answer.ids))] if cut else turns


def last_turn(mask: list[bool]) -> int:
    """Where the last run of scored tokens begins; 0 for a mask without one."""
    place = _behind_last(mask)
    while place and mask[place - 1]:
        place -= 1
    return place


def _behind_last(mask: list[bool]) -> int:
    return max((place + 1 for place, scored in enumerate(mask) if scored), default=0)


def _no_marks(turns: Messages) -> RowFault:
    return RowFault(
        "several_turns",
        f"an answer of {len(turns)} turns: only a chat template with {{% generation %}} marks says which of its tokens "
        "are the assistant's (--chat-template FILE; TRL has such templates for training)",
    )
