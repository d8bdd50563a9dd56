"""The command: every check in turn, each on its own, so that a broken one stops no other."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from prefpipe import terminal
from prefpipe.doctor import findings as words
from prefpipe.doctor import hardware, imports, versions
from prefpipe.doctor.findings import Finding
from prefpipe.shipped import ROOT

Check = Callable[[], Iterable[Finding]]


def _recipes() -> list[Finding]:
    recipes = [*(ROOT / "stages").glob("*/*.toml")]
    if not recipes or not (ROOT / "data" / "prompts.jsonl").is_file():
        return [
            Finding("recipes", "fail", f"none in {ROOT}", "install prefpipe again: its wheel or checkout is not whole")
        ]
    return [Finding("recipes", "ok", f"{len(recipes)}, and the prompts of the demo")]


def _cache() -> list[Finding]:
    from platformdirs import user_cache_path  # noqa: PLC0415  (it may be what is broken)

    return [hardware.disk(user_cache_path("prefpipe"), "cache")]


CHECKS: dict[str, Check] = {
    "packages": versions.findings,
    "recipes": _recipes,
    "torch": hardware.torch,
    "imports": imports.findings,
    "memory": lambda: [hardware.memory()],
    "disk": lambda: [hardware.disk(Path(), "disk")],
    "cache": _cache,
    "hub": lambda: [hardware.hub()],
}


def run(*, as_json: bool, checks: dict[str, Check] = CHECKS) -> int:
    """Print every finding as soon as it is there. Returns 0, or 1 where something must be mended."""
    found: list[Finding] = []
    for name, check in checks.items():
        new = _made(name, check)
        found += new
        if not as_json:
            for finding in new:
                terminal.show("\n".join(words.lines(finding)))
    terminal.show(json.dumps(words.as_json(found), indent=2) if as_json else f"\n{words.summary(found)}")
    return 0 if words.is_healthy(found) else 1


def main(arguments: Sequence[str], broken: BaseException) -> int:
    """`prefpipe doctor` where the command line itself cannot be imported, for which `broken` is the reason."""
    core = Finding("command line", "fail", f"it cannot be imported: {type(broken).__name__}: {broken}", _mend(broken))
    return run(as_json="--json" in arguments, checks={"command line": lambda: [core], **CHECKS})


def _mend(broken: BaseException) -> str:
    name = getattr(broken, "name", None)
    return f"pip install --force-reinstall {str(name or 'typer pydantic pydantic-core rich').partition('.')[0]}"


def _made(name: str, check: Check) -> list[Finding]:
    try:
        return list(check())
    except terminal.OutputClosed:
        raise
    except Exception as error:  # whatever a damaged installation raises
        return [
            Finding(name, "fail", f"it cannot be checked: {type(error).__name__}: {error}", "install prefpipe again")
        ]
