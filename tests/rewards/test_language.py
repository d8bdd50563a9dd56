"""Which language a completion is in."""

import pytest

from prefpipe.config.rewards import Language
from prefpipe.errors import UsageError
from prefpipe.rewards.base import Answer, Scored
from prefpipe.rewards.language import inputs, language
from prefpipe.schemas import Message

SENTENCES = {
    "en": "The old man walked slowly along the river and thought about his children.",
    "de": "Der alte Mann ging langsam am Fluss entlang und dachte an seine Kinder.",
    "fr": "Le vieil homme marchait lentement le long de la rivière et pensait à ses enfants.",
    "es": "El anciano caminaba despacio junto al río y pensaba en sus hijos.",
    "zh": "老人沿着河慢慢走，想着他的孩子们。",  # noqa: RUF001
    "ru": "Старик медленно шёл вдоль реки и думал о своих детях.",  # noqa: RUF001
    "ja": "老人は川沿いをゆっくり歩き、子供たちのことを考えていた。",
}


def rate(code: str, text: str) -> Scored:
    (scored,) = language(Language(language=code))([Answer([Message(role="user", content="?")], text, None)])
    return scored


@pytest.mark.parametrize("code", SENTENCES)
def test_the_right_language_has_most_of_the_probability(code: str) -> None:
    own = rate(code, SENTENCES[code])
    assert own.reward is not None
    assert own.reward > 0.5
    assert own.detail is None
    other = rate("en" if code != "en" else "de", SENTENCES[code])
    assert other.reward is not None
    assert other.reward < 0.5
    assert (other.detail or "").startswith(f"{code} 0.") or (other.detail or "").startswith(f"{code} 1.")


def test_a_text_without_letters_has_no_language() -> None:
    assert rate("en", "42 + 7 = 49") == Scored(0.0, "ok", "no letters")


def test_a_language_that_is_not_known() -> None:
    with pytest.raises(UsageError, match="language = 'xx' is not known"):
        language(Language(language="xx"))


def test_another_version_of_the_identifier_is_another_reward() -> None:
    assert set(inputs(Language())) == {"py3langid"}
