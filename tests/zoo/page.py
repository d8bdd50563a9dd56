"""docs/models.md: what happens to each model of the corpus, and to a small model of each architecture.

python -m tests.zoo.page            # every model, about 15 minutes on one core; writes the page
python -m tests.zoo.page NAME ...   # these again, the others as they stand on the page
"""

import contextlib
import io
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from prefpipe import cli
from tests.conftest import ROOT
from tests.forge import Ended
from tests.zoo import cases, runnable
from tests.zoo.outcomes import Outcome, in_general, outcome

PAGE = ROOT / "docs" / "models.md"
HUB, ARCHITECTURES = "Models of the hub", "Architectures of transformers"
KINDS = {
    "shared": "Completions share a row with their prompt",
    "separate": "Every completion in a row of its own",
    "refused": "Refused",
    "not tried": "Not tried",
    "different": "Different from transformers",
    "crash": "Crash",
}
Outcomes = dict[str, Outcome]
_INTRODUCTION = f"""# Models that were tried

Each model here went through `prefpipe score` and two steps of `prefpipe train` (DPO, LoRA on all linear layers), on a
CPU in float32. It is a small one with random weights: the config of the model with few narrow layers, one of each kind,
windows of 16 tokens, and factors and caps of logits that show. Every log-prob of a token agrees within 1e-4 nats with
full logits of transformers {transformers.__version__}, computed one row at a time; no token changes those before it;
the loss of step 0 is ln 2. Weights of the real models are no part of this: the page says what their architectures do.

Rows that cannot be shared cost up to twice as much and give the same values. Whether they can is tested again at the
start of every run, on its longest rows: windows of thousands of tokens show in longer rows only. "Not tried":
transformers builds no small model from the default config.

`make zoo` makes all of this again and compares it with this page; `python -m tests.zoo.page` writes it.

A model is loaded as transformers loads it, without code of its own: tokens, chat template and end of a completion by
its tokenizer, every weight from its files. Whatever cannot be loaded whole is refused with the names and with what
would help (exit 2, 65 or 66). Token ids were compared with those of transformers (`pytest tests/zoo`; the files of
the models are not part of this repository, without them it compares the templates that come with TRL) for the
tokenizers and templates of Llama 2, 3 and 4, Qwen 1.5 to 3, Mistral, Mixtral, Gemma 1, 2 and 4, Phi 2 and 3, DeepSeek
R1, Falcon, GLM 4.1V, gpt-oss, OLMo 2, OPT, GPT-2, Pythia, BLOOM, SmolLM3, Command R, Zephyr, TinyLlama and others.
"""


def architectures() -> list[str]:
    """Every architecture that transformers loads as a causal language model."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tried(name: str, work: Path, call: Callable[..., Ended]) -> Outcome:
    """What happens to a model of the corpus, or to a small model of an architecture."""
    if (cases.CORPUS / name).is_dir():
        return outcome(runnable.of_corpus(name, work / "model"), work, call)
    try:
        model = runnable.of_architecture(name, work / "model")
    except Exception as error:
        return Outcome("not tried", in_general(" ".join(f"{type(error).__name__}: {error}".split())))
    return outcome(model, work, call)


def read(text: str) -> dict[str, Outcomes]:
    """What the page says, by its two parts."""
    found: dict[str, Outcomes] = {HUB: {}, ARCHITECTURES: {}}
    kinds = {words: kind for kind, words in KINDS.items()}
    part, kind = "", ""
    for line in text.splitlines():
        if line.startswith("## "):
            part = line[3:]
        elif line.startswith("### "):
            kind = kinds[line[4:].partition(" (")[0]]
        elif line.startswith("| `"):
            name, reason, hint = (cell.strip() for cell in line.strip("|").split(" | "))
            found[part][name.strip("` ")] = Outcome(kind, reason, hint.strip("| "))
        elif kind and line.startswith("`"):
            found[part] |= {name: Outcome(kind) for name in re.findall("`([^`]+)`", line)}
    return found


def written(parts: dict[str, Outcomes]) -> str:
    """The page."""
    return _INTRODUCTION + "".join(f"\n## {part}\n{''.join(_sections(found))}" for part, found in parts.items())


def _sections(found: Outcomes) -> Iterator[str]:
    for kind, words in KINDS.items():
        names = sorted(name for name, each in found.items() if each.kind == kind)
        if not names:
            continue
        yield f"\n### {words} ({len(names)})\n"
        if kind == "shared":
            yield f"\n{', '.join(f'`{name}`' for name in names)}\n"
            continue
        yield "\n| model | why | what helps |\n|---|---|---|\n"
        yield from (f"| `{name}` | {found[name].reason} | {found[name].hint} |\n" for name in names)


def _call(*arguments: object) -> Ended:
    """`prefpipe ARGUMENTS` in this process."""
    said = io.StringIO()
    sys.argv = ["prefpipe", *map(str, arguments)]
    code: object = 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    return Ended(code if isinstance(code, int) else 0, said.getvalue())


def main(names: list[str]) -> None:
    """Try these models, or all, and write the page."""
    logging.disable_progress_bar()
    parts = read(PAGE.read_text(encoding="utf-8"))
    if not names:  # what a new transformers has no more is not kept; without the corpus, its models are
        parts = {HUB: {} if cases.every_name() else parts[HUB], ARCHITECTURES: {}}
    for name in names or [*cases.every_name(), *architectures()]:
        with tempfile.TemporaryDirectory() as folder:
            found = tried(name, Path(folder), _call)
        parts[HUB if (cases.CORPUS / name).is_dir() else ARCHITECTURES][name] = found
        print(name, found.kind, found.reason, flush=True)  # noqa: T201
    PAGE.write_text(written(parts), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
