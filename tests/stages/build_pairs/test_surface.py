"""Form alone tells the sides apart when it does, and says which mark."""

import random

from prefpipe.stages.build_pairs.surface import MARKS, shortcut

WORDS = ["the", "old", "harbour", "wakes", "before", "dawn", "and", "boats", "leave", "one", "by", "quay"]


def sentences(seed: int, count: int) -> list[str]:
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=source.randint(4, 12))) + "." for _ in range(count)]


def test_sides_of_one_form_are_a_coin_flip() -> None:
    share, _ = shortcut(sentences(1, 600), sentences(2, 600))
    assert 0.4 < share < 0.6


def test_an_opening_on_one_side_is_found_and_named() -> None:
    share, mark = shortcut(["Sure! " + t for t in sentences(1, 300)], sentences(2, 300))
    assert share == 1.0
    assert mark in ("eager opening", "exclamation marks")


def test_a_mark_of_the_rejected_side_counts_as_well() -> None:
    """Lists on nine of ten rejected: 90 % right, and half of the rest."""
    rejected = [t if n % 10 == 0 else f"- {t}\n- {t}" for n, t in enumerate(sentences(2, 400))]
    share, mark = shortcut(sentences(1, 400), rejected)
    assert 0.9 <= share <= 1.0
    assert mark == "list items"


def test_few_pairs_tell_nothing() -> None:
    assert shortcut([], []) == (0.5, "none")
    assert shortcut(["a"], ["b"]) == (0.5, "none")


def test_marks_by_hand() -> None:
    text = "Certainly! Here:\n- one\n2. two\n# Head\n**bold** ```x``` caf\u00e9 <|im_end|>"
    expected = {"eager opening": 1, "list items": 2, "headings": 1, "bold": 2, "code": 2, "exclamation marks": 1,
                "not ASCII": 1, "control tokens": 1, "ends like a sentence": 0, "refusal opening": 0}  # fmt: skip
    assert {name: mark(text) for name, mark in MARKS.items()} == expected
