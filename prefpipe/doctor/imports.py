"""Whether heavy packages can be imported, and if not, which other package is in their way."""

import importlib.util
import sys
from collections.abc import Sequence
from importlib import metadata

from prefpipe import extras
from prefpipe.doctor import probes
from prefpipe.doctor.findings import Finding
from prefpipe.doctor.probes import Answer

# What a command loads first, by the package.
PROBES = {
    "transformers": "from transformers import AutoModelForCausalLM\nimport transformers.models.llama.modeling_llama",
    "peft": "import peft",
    "vllm": "from vllm import LLM, SamplingParams",
}
_MOST_HIDDEN = 6
# Parts of prefpipe that bring a package, and packages without which nothing works: these are never in the way.
_EXTRAS = {"vllm": ("cpu",)}
_NEEDED = {"torch", "transformers", "peft", "vllm", "safetensors", "tokenizers", "numpy", "huggingface_hub", "prefpipe"}


def findings(names: Sequence[str] = tuple(PROBES)) -> list[Finding]:
    """A finding for each package. What one of them needs away stays away for the next."""
    found: list[Finding] = []
    away: list[str] = []
    for name in names:
        if not _is_there(name):
            need = extras.command(*_EXTRAS.get(name, ("train",)))
            found.append(Finding(name, "absent", "not installed", need))
            continue
        found.append(_finding(name, away))
    return found


def _finding(name: str, away: list[str]) -> Finding:
    answer = probes.ask(PROBES[name])
    if not answer.error:
        return Finding(name, "ok", f"{_version(name)}: it can be imported")
    culprits = _culprits(name, answer, away)
    if not culprits:
        again = f"pip install --force-reinstall {_distribution(name)}"
        return Finding(name, "fail", f"it cannot be imported: {answer.error}", again)
    away += [culprit for culprit in culprits if culprit not in away]
    need = "none of them" if len(culprits) > 1 else "it for nothing"
    return Finding(
        name,
        "fail",
        f"it cannot be imported: {answer.error}; without {' and '.join(culprits)} it can, and prefpipe needs {need}",
        f"pip uninstall {' '.join(map(_distribution, culprits))}",
    )


def _culprits(name: str, answer: Answer, away: Sequence[str]) -> list[str]:
    """As few modules as it takes to hide until the import works; none where that is not enough. `answer` is that of the
    import without hiding, `away` is what others need hidden."""
    hidden = list(away)
    if away:
        answer = probes.ask(PROBES[name], hidden)
    while answer.error and len(hidden) < _MOST_HIDDEN:
        suspect = next((m for m in answer.modules if m not in hidden and _is_extra(m, name)), None)
        if suspect is None:
            return []
        hidden.append(suspect)
        answer = probes.ask(PROBES[name], hidden)
    if answer.error:
        return []
    for module in list(hidden) if len(hidden) > 1 else []:
        fewer = [other for other in hidden if other != module]
        if not probes.ask(PROBES[name], fewer).error:
            hidden = fewer
    return hidden


def _is_extra(module: str, name: str) -> bool:
    """Whether a module is one that prefpipe does without."""
    return module not in _NEEDED and module != name and module not in sys.stdlib_module_names and _is_there(module)


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _version(module: str) -> str:
    try:
        return metadata.version(_distribution(module))
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _distribution(module: str) -> str:
    """The name that pip knows a module by."""
    try:
        return metadata.packages_distributions().get(module, [module])[0]
    except Exception:  # metadata of some package that somebody damaged
        return module
