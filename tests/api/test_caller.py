"""What a call leaves behind in the program that makes it, and how its errors speak."""

import random
import sys
import threading

import numpy as np
import pytest
import torch

from prefpipe.api import caller


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def seed() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


@pytest.fixture
def undisturbed() -> tuple[float, float, float]:
    """What is drawn after `seed` where nothing is called."""
    seed()
    return drawn()


def disturb() -> None:
    with caller.kept():
        drawn()
        torch.manual_seed(7)
        sys.excepthook = print


def test_random_numbers_and_the_hook_of_the_caller_come_back(undisturbed: tuple[float, float, float]) -> None:
    hook = sys.excepthook
    seed()
    disturb()
    assert (drawn(), sys.excepthook) == (undisturbed, hook)


def test_a_thread_gives_nothing_back(undisturbed: tuple[float, float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """The main thread would draw again what it has drawn meanwhile."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    seed()
    thread = threading.Thread(target=disturb)
    thread.start()
    thread.join()
    assert drawn()[2] != undisturbed[2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "choose another --out, or start over with --force (it stays)",
            "another out, or start over with force=True (it",
        ),
        ("the checkpoint is intact, --no-strict goes on", "intact, strict=False goes on"),
        ("look at --max-prompt-tokens, or merge it (--merge)", "look at max_prompt_tokens, or merge it (merge=True)"),
        ("start it with room (vLLM: --max-model-len)", "(vLLM: --max-model-len)"),
        (
            "pass --pairs, or score them: prefpipe score --inputs A --out B",
            "pass pairs, or score them: prefpipe score --",
        ),
        ("runs/a--out and ---out", "runs/a--out and ---out"),
    ],
)
def test_options_are_keywords_in_the_errors_of_python(text: str, words: str) -> None:
    assert words in caller.in_python(text)
