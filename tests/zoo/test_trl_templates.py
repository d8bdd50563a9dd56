"""Every chat template that trl installs renders as in transformers, or both refuse the conversation."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from prefpipe.errors import RowFault
from prefpipe.models.chat import Chat
from prefpipe.models.encoding import render
from tests.models.cases import SHAPES

_TRL = find_spec("trl")
TEMPLATES = sorted((Path(_TRL.origin).parent / "chat_templates").glob("*.jinja")) if _TRL and _TRL.origin else []
THINKING = {"role": "assistant", "content": "<think>\nShort or long?\n</think>\n\nThe owl."}
CONVERSATIONS: dict[str, Any] = {**SHAPES, "thoughts": [*SHAPES["one turn"], THINKING]}


@pytest.fixture(scope="module")
def oracle(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.skipif(not TEMPLATES, reason="trl is not installed")
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_templates_of_trl_render_as_in_transformers(path: Path, chat: Chat, oracle: Any) -> None:
    text = path.read_text(encoding="utf-8")
    dated = replace(chat, template=text, date="today")
    for messages in CONVERSATIONS.values():
        for opens in (True, False):
            try:
                ours = render(dated, messages, add_generation_prompt=opens)
            except RowFault:
                with pytest.raises(Exception):  # noqa: B017, PT011  (whatever the template raises)
                    oracle.apply_chat_template(
                        messages, chat_template=text, add_generation_prompt=opens, tokenize=False
                    )
                continue
            assert ours == oracle.apply_chat_template(
                messages, chat_template=text, add_generation_prompt=opens, tokenize=False
            )
