"""A reward for the language of a completion."""

from importlib.metadata import version

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from prefpipe.config.rewards import Language
from prefpipe.errors import UsageError
from prefpipe.rewards.base import Answer, RewardFunction, Scored, one_by_one

VERSION = 1  # raise it when the reward can change: a run never mixes two versions


def inputs(_settings: Language) -> dict[str, str]:
    """The version of the language identifier, which contains its model."""
    return {"py3langid": version("py3langid")}


def language(settings: Language) -> RewardFunction:
    """The probability that the text is in the language, by py3langid; 0 for a text without letters.

    A degree, so that the status is always ok; the detail names the likeliest language when it is another one. Raises
    UsageError for a language that py3langid does not know.
    """
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if settings.language not in identifier.labels:
        raise UsageError(f"language = '{settings.language}' is not known", f"one of {', '.join(identifier.labels)}")

    def rate(answer: Answer) -> Scored:
        if not any(c.isalpha() for c in answer.text):
            return Scored(0.0, "ok", "no letters")
        ranked = identifier.rank(answer.text)
        (best, certainty) = ranked[0]
        detail = None if best == settings.language else f"{best} {certainty:.2f}"
        return Scored(float(dict(ranked)[settings.language]), "ok", detail)

    return one_by_one(rate)
