"""One HTML page about a run, or about all rounds of `iterate`: it opens from disk and asks no server for anything.

    prefpipe report runs/demo --out demo.html

1. Find out which runs DIR holds, and those that they were made from.
2. Make each section from what is there; one that cannot be made says so, and the others go on.
3. Render the page.
4. Write it, whole or not at all.

A run that is not complete has a page too, which says what is missing.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prefpipe import log
from prefpipe.runs import fsio
from prefpipe.stages.report import answers, data, origin, page, playground, training, verdict
from prefpipe.stages.report.subject import Subject, read
from prefpipe.stages.report.texts import shown

NAME = "report.html"
_SECTIONS: Mapping[str, Callable[[Subject], Any]] = {
    "verdict": verdict.verdict,
    "data": data.data,
    "training": training.training,
    "answers": answers.answers,
    "origin": origin.origin,
    "playground": playground.playground,
}


def run(directory: Path, out: Path | None) -> Path:
    """Write the page about the run in `directory` to `out`, by default report.html in it. Returns its path.

    Raises MissingInputError when there is no such directory, DataError when it holds no run of prefpipe.
    """
    subject = read(directory)  # 1
    sections, failures = _sections(subject)  # 2
    text = page.html(subject, sections, failures)  # 3
    target = out if out is not None else directory / NAME
    fsio.write_text(target, text)  # 4
    return target


def _sections(subject: Subject) -> tuple[dict[str, Any], dict[str, str]]:
    sections: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for name, make in _SECTIONS.items():
        try:
            sections[name] = make(subject)
        except Exception as error:  # files that somebody edited: nine sections in ten are better than none
            sections[name] = None
            failures[name] = shown(f"{type(error).__name__}: {error}", 300)
            log.warn(f"section '{name}' could not be made: {failures[name]}")
    return sections, failures
