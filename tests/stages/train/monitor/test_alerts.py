"""The table of alert rules is the one of the page."""

from prefpipe.stages.train.monitor import conditions
from prefpipe.stages.train.monitor.alerts import RULES
from tests.conftest import ROOT


def test_every_rule_is_documented_as_it_is():
    """docs/diagnostics.md holds a row per rule: name, level, condition, advice, source."""
    page = (ROOT / "docs" / "diagnostics.md").read_text()
    for name, rule in RULES.items():
        row = f"| {name} | {rule.level} | {rule.condition} | {rule.advice} | {rule.source} |"
        assert row in page, row
    assert page.count("\n| A") == len(RULES)


def test_a_rule_has_the_condition_that_names_it():
    """The docstring of a condition begins with its rule: no two rows of the table are mixed up."""
    for name, rule in RULES.items():
        assert str(rule.check.__doc__).startswith(f"{name}: ") or rule.check is conditions.never
