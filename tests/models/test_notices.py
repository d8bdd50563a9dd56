"""What is said of a chat template before a run."""

from dataclasses import replace

import pytest

from prefpipe.errors import MissingInputError
from prefpipe.models import policy
from prefpipe.models.chat import Chat, load_chat
from prefpipe.models.notices import check_ends, notices

EMBEDDED = "embedded:smollm2-135m-instruct"


def test_a_default_system_message_is_reported(chat: Chat) -> None:
    added = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful tool.<|im_end|>\n{% endif %}"
        + chat.template
    )
    (notice,) = notices(replace(chat, template=added))
    assert "a system message of its own: 'system You are a helpful tool.'" in notice
    assert notices(chat) == []


def test_the_real_models_default_system_message_is_reported() -> None:
    try:
        chat = load_chat(policy.resolve(EMBEDDED).directory)
    except MissingInputError as error:
        pytest.skip(str(error))
    (notice,) = notices(chat)
    assert "You are a helpful AI assistant named SmolLM" in notice


CONTENT = "{% for m in messages %}{{ m.content }}"


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("<|im_end|>\n{% endfor %}", ""),
        ("<|endoftext|>{% endfor %}", "ends an answer with '<|endoftext|>', which is no end-of-sequence token"),
        ("{% endfor %}", "writes no end-of-sequence token behind an answer; the model has '<|im_end|>'"),
        ("{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}", "unless another turn follows ('<|im_end|>')"),
    ],
)
def test_answers_without_an_end_are_a_warning_with_what_to_set(
    chat: Chat, capsys: pytest.CaptureFixture[str], ending: str, words: str
) -> None:
    check_ends(replace(chat, template=CONTENT + ending))
    said = " ".join(capsys.readouterr().err.split())
    assert words in said
    assert bool(said) == bool(words)
