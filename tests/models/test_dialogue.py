"""What a template writes around the texts of a conversation is found by rendering; what it only mentions is not."""

from collections.abc import Sequence
from functools import partial

import pytest
from tokenizers import AddedToken

from prefpipe.models import template
from prefpipe.models.dialogue import Render, after_answer, control_tokens, default_system

TURNS = "{% for m in messages %}<turn>{{ m.role }}\n\n{{ m.content }}</turn>\n{% endfor %}"
OPENING = "{% if add_generation_prompt %}<turn>assistant\n<think>{% endif %}"


def renderer(text: str) -> Render:
    return partial(template.render, text, "today", tokens={})


def control(text: str, special: Sequence[str], others: Sequence[str]) -> tuple[set[str], set[str]]:
    """Control tokens in prompts and in answers."""
    added = [AddedToken(t, special=True) for t in special] + [AddedToken(t, special=False) for t in others]
    prompts, answers = control_tokens(added, text, renderer(text))
    return set(prompts), set(answers)


def test_ordinary_tokens_around_turns_are_control_tokens_in_prompts_alone() -> None:
    text = TURNS + "{% if tools %}<tool>{% endif %}" + OPENING
    found = control(text, ["<s>"], ["<turn>", "</turn>", "<tool>", "<think>", "\n\n", "<word>"])
    assert found == ({"<s>", "<turn>", "</turn>"}, {"<s>"})


@pytest.mark.parametrize("mark", ["<think>", "</think>", "[THINK]", "<thought>", "<|begin_of_thought|>", "<reasoning>"])
def test_special_thinking_marks_are_content_of_answers(mark: str) -> None:
    assert control(TURNS + OPENING, ["<s>", mark], []) == ({"<s>", mark}, {"<s>"})
    assert control(TURNS + mark, [], [mark]) == (set(), set())


def test_white_space_is_never_a_control_token() -> None:
    assert control(TURNS, ["\n", "  "], ["\n\n"]) == (set(), set())


def test_a_template_that_refuses_every_probe_is_taken_as_a_whole() -> None:
    text = "{% if messages[0].content != 'x' %}{{ raise_exception('x only') }}{% endif %}<turn>"
    assert control(text, [], ["<turn>", "<word>"]) == ({"<turn>"}, set())


def test_a_default_system_message_is_what_stands_before_the_first_turn_only() -> None:
    text = "<turn>You are a tool.</turn>" + TURNS
    assert default_system(renderer(text), ["<turn>", "</turn>"]) == "You are a tool."
    assert default_system(renderer(TURNS), ["<turn>", "</turn>"]) == ""


def test_what_follows_an_answer() -> None:
    assert after_answer(renderer(TURNS)) == "</turn>\n"
    assert after_answer(renderer(TURNS), more=True) == "</turn>\n<turn>user\n\n"
    between = "{% for m in messages %}{{ m.content }}{% if not loop.last %}</s>{% endif %}{% endfor %}"
    assert (after_answer(renderer(between)), after_answer(renderer(between), more=True)) == ("", "</s>")
    assert after_answer(renderer("no text")) is None
    assert after_answer(renderer("{{ raise_exception('no') }}")) is None
