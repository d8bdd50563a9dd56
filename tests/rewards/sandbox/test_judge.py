"""What the script says of programs. What it keeps them from is tested in test_code_tests and test_forging."""

import ast
import sys
from pathlib import Path

import pytest

from prefpipe.rewards import sandbox
from prefpipe.rewards.sandbox import judge


@pytest.mark.parametrize(
    ("program", "tests", "verdict"),
    [
        ("x = 1", "assert x == 1", None),
        ("x = 1", "assert x == 2, 'no'", "tests: AssertionError: no"),
        ("x = ", "assert True", "program: SyntaxError: invalid syntax (program, line 1)"),
        ("raise SystemExit", None, None),
        ("raise SystemExit(0)", None, None),
        ("raise SystemExit(2)", None, "program: ended with exit code 2"),
        ("raise SystemExit(0)", "assert True", "program: ended with exit code 0"),
        ("assert __name__ == '__main__'", None, None),
        ("assert __name__ == 'program'", "assert True", None),
    ],
)
def test_run(program: str, tests: str | None, verdict: str | None) -> None:
    namespace: dict[str, object] = {"__name__": "__main__" if tests is None else "program"}
    said = judge.run(program, "program", namespace, script=tests is None)
    assert (said or (tests and judge.run(tests, "tests", namespace, script=False))) == verdict


def test_it_is_a_script_of_the_standard_library_alone() -> None:
    """It runs with `python -I`, where the package may not be found."""
    files = list(Path(sandbox.__file__).parent.glob("*.py"))
    nodes = [n for file in files for n in ast.walk(ast.parse(file.read_text()))]
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module and not n.level}
    assert {name.partition(".")[0] for name in names} <= set(sys.stdlib_module_names) | {"numpy"}
    siblings = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.level} - {None}
    assert siblings <= {file.stem for file in files}
