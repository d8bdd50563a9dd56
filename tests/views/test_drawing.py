"""Texts of others are shown, never obeyed, on a terminal and in a page; long ones are cut and say so."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefpipe.views import drawing

LONG = "start " + "x" * 5000 + " end"


def drawn(capsys: pytest.CaptureFixture[str], *parts: object) -> str:
    drawing.show(*parts)  # type: ignore[arg-type]
    return capsys.readouterr().out


def test_a_long_text_is_cut_unless_the_row_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"completion_id": "c", "text": LONG, "token_ids": [1, 2, 3]}
    short = drawn(capsys, drawing.row(values, 1, whole=False))
    assert "characters ...]" in short
    assert "3 values" not in short
    whole = drawn(capsys, drawing.row(values, 1, whole=True))
    assert "x" * 5000 in whole.replace("\n", "").replace(" ", "")
    assert "3 values" in whole


def test_turns_calls_and_candidates_are_conversations(capsys: pytest.CaptureFixture[str]) -> None:
    answer = [{"role": "assistant", "content": "", "extra": '{"tool_calls": []}'}]
    group = {"prompt_id": "p", "prompt": [{"role": "user", "content": "Hi"}], "completions": [answer, answer]}
    shown = drawn(capsys, drawing.row(group, 1, whole=False))
    assert "user  Hi" in shown
    assert "completions 1" in shown
    assert "completions 2" in shown
    assert shown.count("tool_calls") == 2


@given(st.text(max_size=60))
def test_no_text_is_markup_or_html(text: str) -> None:
    page = drawing.html("t", drawing.table(["a"], [[f"[red]{text}</pre><script>"]]), drawing.text(f"[link=x]{text}"))
    assert "<script" not in page
    assert "&lt;script" in page.replace("\n", "")
    assert "[link=x]" in page.replace("\n", "")


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (20 << 20, "20 MiB"), (3 << 50, "3072 TiB")]
)
def test_sizes_have_a_unit(count: int, shown: str) -> None:
    assert drawing.size(count) == shown
