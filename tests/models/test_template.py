"""Chat templates render as in transformers, cannot reach Python, and come from where a model keeps them."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from prefpipe.errors import DataError, MissingInputError, RowFault
from prefpipe.models import template
from prefpipe.models.chat import Chat, load_chat
from prefpipe.models.encoding import Rules, encode_prompt, render
from tests.models.cases import SHAPES, USER

# What real templates use: named tokens, loop controls, JSON, block trimming, namespaces, slices, the generation tag.
TEMPLATES = {
    "named tokens": "{{ bos_token }}{% for m in messages %}{{ m.content | trim }}{{ eos_token }}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}"
    "{% break %}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "json as ASCII": "{{ messages | tojson(ensure_ascii=true) }}",
    "trimmed blocks": "{% for m in messages %}\n    {% if true %}\n  {{ m.content }}\n    {% endif %}\n{% endfor %}\n",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "slices": "{{ messages[-1]['content'][:3] }}{% for m in messages[::-1] %}{{ m['role'] }}{% endfor %}",
    "no tools": "{% if tools %}{{ tools }}{% endif %}{% if documents is none %}x{% endif %}{{ unknown_name }}",
    "generation tag": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
}


@pytest.mark.parametrize("construct", TEMPLATES)
def test_every_construct_of_templates_renders_as_in_transformers(chat: Chat, tiny_model: Path, construct: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for messages in SHAPES.values():
        expected = tokenizer.apply_chat_template(messages, chat_template=TEMPLATES[construct], tokenize=False)
        assert render(replace(chat, template=TEMPLATES[construct]), messages, add_generation_prompt=False) == expected


MARKED = (
    "{% for m in messages %}[{% if m.role == 'assistant' %}{% generation %}{{ m.content }}!{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}]{% endfor %}"
)


def test_what_a_template_marks_is_told_by_its_characters() -> None:
    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant", "tool", "assistant")]
    text, spans = template.render_with_spans(MARKED, "today", turns, {}, add_generation_prompt=False)
    assert text == "[u][a!][t][a!]"
    assert [text[start:end] for start, end in spans] == ["a!", "a!"]
    assert spans == [(4, 6), (11, 13)]
    assert template.render(MARKED, "today", turns, {}, add_generation_prompt=False) == text


def test_a_template_that_refuses_leaves_no_marks_behind() -> None:
    """transformers keeps what it has marked so far with the compiled template, of which there is one."""
    refusing = MARKED.replace("{{ m.content }}!", "{{ m.content }}{{ raise_exception('no') if m.content == 'x' }}!")
    bad, good = ([{"role": "assistant", "content": content}] for content in ("x", "y"))
    for _ in range(2):
        with pytest.raises(RowFault, match="no"):
            template.render_with_spans(refusing, "today", bad, {}, add_generation_prompt=False)
        assert template.render_with_spans(refusing, "today", good, {}, add_generation_prompt=False) == (
            "[y!]",
            [(1, 3)],
        )


@pytest.mark.parametrize(
    ("text", "marks"), [(MARKED, True), ("{%- generation -%}a{%- endgeneration -%}", True), ("{{ generation }}", False)]
)
def test_whether_a_template_marks_the_assistant(text: str, marks: bool) -> None:
    assert template.marks_assistant(text) is marks


def test_the_date_is_the_local_one(chat: Chat) -> None:
    text = render(replace(chat, template="{{ strftime_now('%Y') }}"), [USER], add_generation_prompt=False)
    assert text.isdigit()
    assert len(text) == 4


def test_a_template_that_refuses_gives_its_own_words(chat: Chat) -> None:
    refusing = replace(chat, template="{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}x")
    assert render(refusing, [USER], add_generation_prompt=False) == "x"
    with pytest.raises(RowFault, match="one turn only") as caught:
        render(refusing, SHAPES["system first"], add_generation_prompt=False)
    assert caught.value.reason == "template_refused"


def test_a_template_cannot_reach_python(chat: Chat) -> None:
    """The sandbox refuses attributes with underscores; transformers' does the same."""
    hostile = replace(chat, template="{{ messages.__class__.__mro__ }}")
    with pytest.raises(RowFault, match="unsafe"):
        render(hostile, [USER], add_generation_prompt=False)


def test_a_template_that_is_not_jinja_is_one_error_with_a_hint(copy: Path) -> None:
    """One error for the whole run, not a fault of every row."""
    (copy / "chat_template.jinja").write_text("{% for m in messages %}")
    with pytest.raises(DataError, match="not valid Jinja") as caught:
        encode_prompt(load_chat(copy), [USER], max_tokens=1000, rules=Rules("drop"))
    assert "--chat-template" in caught.value.hint


ECHO = "{{ messages[0].content }}"


def test_a_template_comes_from_a_file_the_jinja_file_or_the_settings(copy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jinja"
    other.write_text(ECHO + "other")
    assert load_chat(copy, str(other)).template == ECHO + "other"
    (copy / "chat_template.jinja").unlink()
    file = copy / "tokenizer_config.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({**saved, "chat_template": ECHO + "inside"}))
    assert load_chat(copy).template == ECHO + "inside"
    named = [{"name": "tool_use", "template": ECHO + "tools"}, {"name": "default", "template": ECHO + "plain"}]
    file.write_text(json.dumps({**saved, "chat_template": named}))
    assert load_chat(copy).template == ECHO + "plain"


def test_several_named_templates_without_a_default_are_listed(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    file = copy / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": ECHO + "tools"}, {"name": "rag", "template": ECHO + "documents"}]
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": named}))
    with pytest.raises(MissingInputError, match="no default one: rag, tool_use") as caught:
        load_chat(copy)
    assert "--chat-template rag" in caught.value.hint
    assert load_chat(copy, "tool_use").template == ECHO + "tools"


def test_any_error_of_a_template_is_its_refusal(chat: Chat) -> None:
    for text in (
        "{{ 1 / 0 }}",
        "{{ messages[0].content.nothing.more }}",
        "{{ 1 + messages[0].content }}",
    ):
        with pytest.raises(RowFault) as caught:
            render(replace(chat, template=text), [USER], add_generation_prompt=False)
        assert caught.value.reason == "template_refused"
        assert caught.value.detail


@pytest.mark.parametrize("hostile", [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ 'a' * 99999999 }}",
    "{{ 'a' * 10 ** 18 }}", "{{ 1 / 0 }}", "{{ messages.a.b }}", "{{ [].pop() }}", "{{ ''.__class__.__mro__ }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
])  # fmt: skip
def test_a_hostile_template_is_a_fault_of_the_row(hostile: str) -> None:
    with pytest.raises(RowFault) as fault:
        template.render(hostile, "today", [USER], {}, add_generation_prompt=False)
    assert len(fault.value.detail) <= 500


def test_ordinary_loops_are_as_they_were() -> None:
    text = "{% for i in range(3) %}{{ i }}{% endfor %}{% for i in range(4, 0, -2) %}{{ i }}{% endfor %}"
    assert template.render(text, "today", [USER], {}, add_generation_prompt=False) == "01242"


def test_two_threads_may_render_one_template() -> None:
    """The second one begins in the middle of the first: its row would be refused, and dropped."""
    found: list[str] = []

    def rendered(content: object) -> str:
        messages = [{"role": "user", "content": content}]
        return template.render("{{ messages[0]['content'] }}", "today", messages, {}, add_generation_prompt=False)

    second = threading.Thread(target=lambda: found.append(rendered("second")))

    class First:
        def __str__(self) -> str:
            second.start()
            second.join(0.2)  # it waits for the first
            return "first"

    found.append(rendered(First()))
    second.join()
    assert sorted(found) == ["first", "second"]
