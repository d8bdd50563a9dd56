"""What a card may show, and the name of the base model in one."""

from pathlib import Path

import pytest

from prefpipe.errors import UsageError
from prefpipe.exports import cards

KEY = "hf_" + "a1B2c3D4e5" * 3


@pytest.mark.parametrize(
    "text",
    [
        "base: /srv/models/mine",
        '{"x": "/data/me/a b/c.json"}',
        "~/models/x",
        "file:///srv/x",
        "(/a/b)",
    ],
)
def test_a_place_on_this_machine_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="shows a place on this machine"):
        cards.check_open("README.md", text)


def test_the_home_of_the_user_is_refused_in_any_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/users-of-this-test")
    with pytest.raises(UsageError, match="/users-of-this-test"):
        cards.check_open("README.md", "x=/users-of-this-test")


def test_a_key_is_refused_and_not_shown() -> None:
    with pytest.raises(UsageError, match="what looks like a key") as error:
        cards.check_open("README.md", f"judge with {KEY}")
    assert KEY not in error.value.message


@pytest.mark.parametrize(
    "text",
    [
        "org/model, PATH/adapter, rewards/margins, https://host.example/a/b",
        "{% if a %}</tool_call></b>{% endif %} and/or 1/2 w/o",
        "ratio a / b / c, ./x/y, reward mine:f",
        '{"base_model_name_or_path": "org/name"}',
        '{"chat_template": "Q:\\nA:\\n/think or /no_think"}',
    ],
)
def test_other_texts_pass(text: str) -> None:
    cards.check_open("README.md", text)


def test_a_local_base_is_told_from_a_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not cards.is_local("org/model")
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert cards.is_local("org/model")
    assert [cards.is_local(name) for name in ("m", "../m", "/srv/m", "a/b/c", "", "embedded:x")] == [True] * 6


def test_the_base_has_another_name_where_it_stands_and_nowhere_else() -> None:
    card = '---\nbase_model: m\ntags: [m]\n---\nmy m\nfrom_pretrained("m")\n'
    assert cards.base_of(card) == "m"
    assert cards.with_base(card, "m", "o/n") == '---\nbase_model: o/n\ntags: [m]\n---\nmy m\nfrom_pretrained("o/n")\n'
    assert cards.with_base('{"base_model_name_or_path": "/x \\"y"}', '/x "y', "o/n") == (
        '{"base_model_name_or_path": "o/n"}'
    )
