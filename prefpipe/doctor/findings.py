"""What was looked at, how it is, and what to do; in lines for people and as JSON."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["ok", "absent", "warn", "fail"]
_WIDTH = 96  # characters of the text beside state and name


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `absent` is a part that is not installed and need not be, `warn` limits what can be
    done, `fail` must be mended. `do` is a command or a sentence, empty where nothing is to do."""

    name: str
    state: State
    what: str
    do: str = ""


def is_healthy(findings: Sequence[Finding]) -> bool:
    """Whether nothing must be mended."""
    return all(finding.state != "fail" for finding in findings)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """`healthy`, and the findings in order."""
    return {"healthy": is_healthy(findings), "findings": [asdict(finding) for finding in findings]}


def lines(finding: Finding) -> list[str]:
    """The lines of one finding."""
    name = f"{finding.state.upper() if finding.state == 'fail' else finding.state:<7} {finding.name:<13} "
    text = textwrap.wrap(finding.what, _WIDTH, break_on_hyphens=False, break_long_words=False)
    beside = [*text, *(f"-> {part}" for part in finding.do.splitlines())]
    return [name + beside[0], *(" " * len(name) + line for line in beside[1:])]


def summary(findings: Sequence[Finding]) -> str:
    """The last line."""
    broken = [finding.name for finding in findings if finding.state == "fail"]
    return f"to mend: {', '.join(broken)}" if broken else "nothing is broken"
