"""Every command of README and guide runs, in the order of its page, on the tiny model and the files of the page.

Those that need GPUs, other machines or another program are read by the command line only: tests/meta/test_pages.py.
"""

from pathlib import Path

import pytest

from tests.forge import Forge
from tests.meta import pages

SAMPLE = {"engine": "transformers", "dtype": "float32", "max-tokens": 8, "num-samples": 3}
TRAIN = {"dtype": "float32", "lora-r": 2}
PAIRS = {"truncated-chosen": "keep", "gap-filter": "none"}
# What makes a command small, and what lets random answers pass, which end at max_tokens.
SMALL: dict[str, dict[str, object]] = {
    "generate": {**SAMPLE, "check": 0},
    "score": {"engine": "transformers", "dtype": "float32", "check": 0},
    "build-pairs": PAIRS,
    "train": TRAIN,
    "plan": TRAIN,
    "evaluate": SAMPLE,
}
SMALL["iterate"] = {
    f"{t}.{name}": v for t in ("generate", "build-pairs", "train", "evaluate") for name, v in SMALL[t].items()
}
ELSEWHERE = ("--cluster", "doctor")  # doctor says what this machine lacks


def run(forged: Forge, page: Path, folder: Path, model: Path) -> int:
    """Write the files of a page and run its commands. Returns how many ran."""
    ran = 0
    for name, text in pages.files(page).items():
        (folder / name).write_text(text.replace("org/model", str(model)))
    for program, *words in pages.commands(page):
        if program != "prefpipe" or any(word in ELSEWHERE for word in words):
            continue
        small = [word for name, value in SMALL.get(words[0], {}).items() for word in (f"--{name}", value)]
        ended = forged.run(
            *(str(model) if word == "org/model" else word for word in words), *small, cwd=folder,
            inline="tests.stages.iterate.cases",
        )  # fmt: skip
        assert ended.code == 0, f"{words}: {ended.stderr}"
        ran += 1
    return ran


@pytest.mark.timeout(1200)
def test_the_commands_of_every_page_run(forged: Forge, tiny_model: Path, tmp_path: Path) -> None:
    """In one folder, and those of "your own data" first: the runs that they make are those that other pages read."""
    for page in sorted(pages.FOR_USERS, key=lambda page: page.name != "data.md"):
        assert run(forged, page, tmp_path, tiny_model) > 2
