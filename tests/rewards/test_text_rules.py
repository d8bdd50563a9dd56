"""The rule reward: one short sentence about the topic."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.config.rewards import Keyword, Length, Refusal, Repetition, ShortSentence
from prefpipe.rewards import text_rules as r
from prefpipe.rewards.base import Answer, RewardFunction, Scored
from prefpipe.rewards.text_rules import echoes, is_one_sentence, names, num_words
from prefpipe.schemas import Message

short_sentence = r.short_sentence(ShortSentence())

PROMPT = "Tell me about a thing in one short sentence of at most ten words."


def answer(text: str, topic: str | None) -> Answer:
    return Answer([Message(role="user", content=PROMPT)], text, topic)


@pytest.mark.parametrize(
    ("text", "topic", "reward", "detail"),
    [
        # (2 * length + sentence + topic + own) / 5, length = min(1, words/5, 10/words)
        ("A falcon is a fast bird of prey.", "falcon", (2 * 1 + 1 + 1 + 1) / 5, None),
        ("A falcon.", "falcon", (2 * 2 / 5 + 1 + 1 + 1) / 5, "2 words"),
        ("A falcon is a bird", "falcon", (2 * 1 + 0 + 1 + 1) / 5, "not one sentence"),
        ("A falcon is a bird. It is fast.", "falcon", (2 * 1 + 0 + 1 + 1) / 5, "not one sentence"),
        ("A falcon is a bird!", "falcon", (2 * 1 + 0 + 1 + 1) / 5, "not one sentence"),
        ("A falcon is\na fast bird.", "falcon", (2 * 1 + 0 + 1 + 1) / 5, "not one sentence"),
        ("It is a fast bird.", "falcon", (2 * 1 + 1 + 0 + 1) / 5, "topic missing"),
        ("A falcon in one short sentence.", "falcon", (2 * 1 + 1 + 1 + 0) / 5, "echoes the prompt"),
        ("Falcons are fast birds of prey.", "falcon", 1.0, None),
        ("Many churches are built of stone.", "church", 1.0, None),
        ("A carpet lies on the floor.", "car", (2 * 1 + 1 + 0 + 1) / 5, "topic missing"),
        ("A FALCON flies over the field.", "falcon", 1.0, None),
        ("A polar bear lives on ice.", "polar bear", 1.0, None),
        ("one " * 19 + "falcon.", "falcon", (2 * 10 / 20 + 1 + 1 + 1) / 5, "20 words"),
        ("  A falcon is a fast bird. \n", "falcon", 1.0, None),
        ("", "falcon", 0.0, "0 words, not one sentence, topic missing, echoes the prompt"),
        (".", "falcon", (2 * 1 / 5 + 1 + 0 + 1) / 5, "1 words, topic missing"),
        ("It costs 3.5 coins at most.", "coin", 1.0, None),
        ("C++ is a fast old language.", "C++", 1.0, None),
    ],
)
def test_rewards_by_hand(text: str, topic: str, reward: float, detail: str | None) -> None:
    (scored,) = short_sentence([answer(text, topic)])
    assert scored.reward == pytest.approx(reward, abs=1e-12)
    assert scored.status == "ok"
    assert scored.detail == detail


def test_a_fragment_never_beats_a_sentence() -> None:
    """ "A falcon." has 2 of 5 words: (0.8 + 3) / 5 = 0.76. The sentence has all: 1."""
    fragment, sentence = short_sentence(
        [answer("A falcon.", "falcon"), answer("A falcon is a fast bird of prey.", "falcon")]
    )
    assert fragment.reward == pytest.approx(0.76)
    assert sentence.reward == 1.0


def test_one_word_too_few_costs_more_than_one_too_many() -> None:
    """4 words: length 4/5, so (1.6 + 3) / 5 = 0.92. 11 words: length 10/11, so (20/11 + 3) / 5 = 0.9636."""
    few, many = short_sentence([answer("A falcon flies fast.", "falcon"), answer("falcon " * 10 + "falcon.", "falcon")])
    assert few.reward == pytest.approx(0.92)
    assert many.reward == pytest.approx((20 / 11 + 3) / 5)


def test_an_echo_is_a_long_word_of_the_instruction_and_not_of_the_topic() -> None:
    """Words of five letters or more count; a topic that the instruction spells too is no echo."""
    assert echoes(PROMPT, "falcon", "A short one.")
    assert echoes(PROMPT, "falcon", "SHORT!")
    assert not echoes(PROMPT, "falcon", "Tell me of ten at most.")
    assert not echoes(PROMPT, "short story", "A short story is old.")
    assert not echoes(PROMPT, "falcon", "Shortly after.")


def test_without_a_topic_nothing_is_named() -> None:
    (scored,) = short_sentence([answer("A falcon is a fast bird.", None)])
    assert scored.reward == pytest.approx(0.8)
    assert not names("", "anything")


@settings(deadline=None)
@given(st.text(), st.one_of(st.none(), st.text(max_size=10)))
def test_any_text_is_rated_between_0_and_1(text: str, topic: str | None) -> None:
    (scored,) = short_sentence([answer(text, topic)])
    assert scored.reward is not None
    assert 0 <= scored.reward <= 1
    assert scored.status == "ok"


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["falcon", "falcons", "bird", "a", "it.", "so", "words"]), max_size=12),
    st.sampled_from([".", "", "!", "..", " ."]),
)
def test_all_rules_and_nothing_less_earn_1(words: list[str], end: str) -> None:
    text = (" ".join(words) + end).strip()
    (scored,) = short_sentence([answer(text, "falcon")])
    rules = (5 <= num_words(text) <= 10, is_one_sentence(text), names("falcon", text), "words" not in words)
    assert (scored.reward == 1.0) == all(rules)
    assert (scored.detail is None) == all(rules)


def test_answers_are_rated_one_by_one_in_their_order() -> None:
    answers = [answer(text, "owl") for text in ("An owl hunts at night.", "", "An owl.")]
    assert short_sentence(answers) == [short_sentence([a])[0] for a in answers]
    assert short_sentence([]) == []


def rate(reward: RewardFunction, text: str, topic: str | None = None, num_tokens: int | None = None) -> Scored:
    (scored,) = reward([Answer([Message(role="user", content=PROMPT)], text, topic, num_tokens=num_tokens)])
    return scored


@pytest.mark.parametrize(
    ("settings", "text", "tokens", "scored"),
    [
        (Length(min=2, max=4), "one two three", 9, Scored(1.0)),
        (Length(min=2, max=4), " one ", 9, Scored(1 / 2, "ok", "1 words")),
        (Length(min=2, max=4), "a b c d e", 9, Scored(4 / 5, "ok", "5 words")),
        (Length(min=2, max=4), "", 9, Scored(0.0, "ok", "0 words")),
        (Length(min=0, max=4), "", 9, Scored(1.0)),
        (Length(min=4, max=8, unit="characters"), "\n abc  ", 9, Scored(3 / 4, "ok", "3 characters")),
        (Length(min=4, max=6, unit="tokens"), "", 9, Scored(6 / 9, "ok", "9 tokens")),
        (Length(unit="tokens"), "words", None, Scored(None, "unparsable", "this completion has no token ids")),
    ],
)
def test_length(settings: Length, text: str, tokens: int | None, scored: Scored) -> None:
    assert rate(r.length(settings), text, num_tokens=tokens) == scored


@pytest.mark.parametrize(
    ("settings", "text", "scored"),
    [
        (Keyword(all=("owl", "big cat")), "A BIG CAT and an owl.", Scored(1.0)),
        (Keyword(all=("owl", "big cat")), "An owl, a big  cat.", Scored(1 / 2, "ok", "'big cat' missing")),
        (Keyword(all=("owl",)), "A growl, owls, owl_1", Scored(0.0, "ok", "'owl' missing")),
        (Keyword(any=("owl", "cat")), "My cat.", Scored(1.0)),
        (Keyword(any=("owl", "cat")), "My dog.", Scored(0.0, "ok", "none of 'owl', 'cat'")),
        (Keyword(none=("owl", "cat")), "My cat.", Scored(1 / 2, "ok", "'cat' found")),
        (
            Keyword(all=("a", "b"), any=("c",), none=("d",)),
            "a d",
            Scored(1 / 4, "ok", "'b' missing, none of 'c', 'd' found"),
        ),
        (Keyword(all=("Owl",), ignore_case=False), "an owl", Scored(0.0, "ok", "'Owl' missing")),
        (Keyword(all=("C++",)), "I like C++.", Scored(1.0)),
        (Keyword(), "It is a falcon.", Scored(1.0)),
        (Keyword(), "It is an owl.", Scored(0.0, "ok", "'falcon' missing")),
    ],
)
def test_keyword(settings: Keyword, text: str, scored: Scored) -> None:
    assert rate(r.keyword(settings), text, "falcon") == scored


def test_keyword_without_words_and_without_an_answer_is_no_zero() -> None:
    assert rate(r.keyword(Keyword()), "anything", None).reward is None


@pytest.mark.parametrize(
    ("n", "text", "scored"),
    [
        (1, "a A b c", Scored(3 / 4, "ok", "3 of 4 1-grams are distinct")),
        (2, "a b a b a", Scored(2 / 4, "ok", "2 of 4 2-grams are distinct")),
        (3, "a b", Scored(1.0)),
        (3, "", Scored(1.0)),
        (3, "a b c d e", Scored(1.0)),
    ],
)
def test_repetition(n: int, text: str, scored: Scored) -> None:
    assert rate(r.repetition(Repetition(n=n)), text) == scored


@settings(deadline=None)
@given(st.lists(st.sampled_from("ab"), max_size=12), st.integers(1, 4))
def test_repetition_against_a_plain_count(words: list[str], n: int) -> None:
    seen = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    distinct = [g for i, g in enumerate(seen) if g not in seen[:i]]
    expected = len(distinct) / len(seen) if seen else 1.0
    assert rate(r.repetition(Repetition(n=n)), " ".join(words)).reward == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "is_refusal"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry, but no.", True),
        ("As an AI, I have no birthday.", True),
        ("Unfortunately, I cannot do this.", True),
        ("Put the kettle on. " + "Wait a minute. " * 20 + "I can't say more.", False),
        ("You can't go wrong with tea.", False),
        ("A pi cannot be rational.", False),
        ("", False),
    ],
)
def test_refusal(text: str, is_refusal: bool) -> None:
    answered, refused = (r.refusal(Refusal(prefer=p)) for p in ("answer", "refusal"))
    assert (rate(answered, text).reward, rate(refused, text).reward) == ((0.0, 1.0) if is_refusal else (1.0, 0.0))
    assert rate(answered, text).status == ("wrong" if is_refusal else "ok")


def test_refusals_in_the_users_words() -> None:
    german = r.refusal(Refusal(phrases=("Das kann ich nicht",)))
    assert rate(german, "das kann ich nicht tun.") == Scored(0.0, "wrong", "says 'das kann ich nicht'")
