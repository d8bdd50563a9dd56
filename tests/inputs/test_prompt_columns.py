"""The prompt of a row, from whichever columns hold it."""

from typing import Any

import pytest

from prefpipe.errors import RowFault
from prefpipe.inputs import prompt_columns


@pytest.mark.parametrize(("row", "contents"), [
    ({"prompt": "a", "question": "b"}, ["a"]), ({"prompt": None, "question": "b"}, ["b"]),
    ({"instruction": "a", "input": ""}, ["a"]), ({"instruction": "a", "input": "b"}, ["a\nb"]),
    ({"input": "b"}, ["b"]), ({"prompt": "a", "system": "s", "history": [["q", "r"]]}, ["s", "q", "r", "a"]),
    ({"prompt": "a", "system": " ", "system_prompt": None}, ["a"]), ({"prompt": [], "system": "s"}, []),
])  # fmt: skip
def test_columns_of_a_prompt(row: dict[str, Any], contents: list[str]) -> None:
    assert [message["content"] for message in prompt_columns.prompt_of(row)] == contents


def test_a_row_without_a_prompt_lists_its_columns() -> None:
    with pytest.raises(RowFault, match=r"no field holds the prompt \(fields: title\)"):
        prompt_columns.prompt_of({"title": "a"})
    with pytest.raises(RowFault, match=r"\(fields: none\)"):
        prompt_columns.prompt_of({})
