"""What a line that begins with / changes, and what it says."""

import pytest

from prefpipe.chat.settings import Settings


@pytest.mark.parametrize(
    ("line", "said", "changed"),
    [
        ("/seed 12", "seed = 12", {"seed": 12}),
        ("/temperature 0", "temperature = 0", {"temperature": 0.0}),
        ("/temperature 1.25", "temperature = 1.25", {"temperature": 1.25}),
        ("/max 9", "max = 9", {"max_tokens": 9}),
        ("/base", "the base is silent", {"with_base": False}),
        ("/temperature 3", "temperature goes from 0 to 2", {}),
        ("/temperature nan", "temperature goes from 0 to 2", {}),
        ("/seed", "/seed wants a number: /seed 7", {}),
        ("/seed -1", "seed = -1 is too small", {}),
        ("/max 0", "max = 0 is too small", {}),
        ("/max many", "/max wants a number: /max 7", {}),
        ("/sead 3", "no command /sead: /help lists them", {}),
    ],
)
def test_a_line_changes_one_setting_or_none(line: str, said: str, changed: dict[str, object]) -> None:
    settings = Settings()
    assert settings.change(line) == said
    assert vars(settings) == {**vars(Settings()), **changed}


def test_the_base_comes_back_and_help_names_every_command() -> None:
    settings = Settings(with_base=False)
    assert settings.change("/base") == "the base answers too"
    assert settings.with_base
    listed = {line.split()[0] for line in settings.change("/help").splitlines()}
    assert listed == {"/seed", "/base", "/temperature", "/max", "/reset", "/help", "/quit"}
