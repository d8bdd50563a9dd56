"""Findings in lines and as JSON."""

from prefpipe.doctor import findings
from prefpipe.doctor.findings import Finding

BROKEN = Finding("torch", "fail", "word " * 40, "pip install torch")
FINE = Finding("disk", "ok", "much")


def test_only_what_fails_makes_an_installation_ill() -> None:
    others = [Finding("x", "absent", ""), Finding("y", "warn", ""), FINE]
    assert findings.is_healthy(others)
    assert not findings.is_healthy([*others, BROKEN])
    assert findings.summary(others) == "nothing is broken"
    assert findings.summary([BROKEN, FINE]) == "to mend: torch"


def test_lines_have_the_state_first_and_what_to_do_last() -> None:
    lines = findings.lines(BROKEN)
    assert lines[0].startswith("FAIL    torch")
    assert lines[-1].strip() == "-> pip install torch"
    assert len(lines) > 2
    assert findings.lines(FINE) == ["ok      disk          much"]


def test_json_has_every_field() -> None:
    assert findings.as_json([FINE]) == {
        "healthy": True,
        "findings": [{"name": "disk", "state": "ok", "what": "much", "do": ""}],
    }
