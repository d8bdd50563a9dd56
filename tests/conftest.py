"""Fixtures for all tests: a tiny model, and the command line as a user calls it."""

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis.internal.conjecture import providers

from prefpipe import cli as command_line
from prefpipe.models.chat import Chat, load_chat
from tests.forge import ROOT, TRAIN, Ended, Forge, forge
from tests.quick import quick, usual
from tests.tiny import make_adapter, make_model
from tests.waiting import PATIENCE_S

quick()
# Property tests draw the same examples each time, however busy the machine is. Hypothesis would also draw constants of
# the modules that are imported, which is the doing of other tests. `--hypothesis-profile default` draws new examples.
settings.load_profile("ci")
providers._get_local_constants = lambda: providers._local_constants  # none, since nobody looks

Cli = Callable[..., subprocess.CompletedProcess[str]]
Write = Callable[..., Path]


COMMANDS = (
    *("prefpipe.engines.transformers", "prefpipe.stages.evaluate.stage", "prefpipe.stages.iterate.stage"),
    *("prefpipe.stages.train.plan", "prefpipe.rewards", "prefpipe.rewards.model"),
)
Call = Callable[..., Ended]


# Modules that train whole runs or load a model in every test are slow as a whole.
WHOLE_RUNS = (
    *("e2e/", "examples/", "proofs/test_addition.py", "proofs/test_tabular.py", "faults/test_damage.py"),
    "faults/test_mended.py",
    *("forward/test_logps.py", "engines/test_transformers.py", "rewards/test_model.py"),
    *(f"engines/test_server{part}.py" for part in ("", "_place", "_pool", "_trust")),
    *(
        "stages/iterate/test_stage.py",
        "stages/iterate/test_rounds.py",
        "stages/iterate/test_branch.py",
        "stages/iterate/test_summary.py",
        "stages/train/losses/test_every_loss.py",
        "stages/train/reference/test_other_reference.py",
    ),
    *(
        f"stages/train/test_{name}.py"
        for name in (
            "checkpoint",
            "evaluation",
            "loop",
            "memory",
            "outputs",
            "parallel",
            "stage",
            "start",
            "telling",
            "trl_trainer",
        )
    ),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what `make test-fast` leaves out: tests that ask for a process, and modules of whole runs."""
    for item in items:
        if {"cli", "shell", "forged"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("process")
        if item.nodeid.removeprefix("tests/").startswith(WHOLE_RUNS):
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """Searches for garbage leave out what the imports of all test modules have made."""
    gc.collect()
    gc.freeze()


def pytest_make_parametrize_id(val: object) -> str | None:
    """Names of tests hold no bytes: gzip writes the time into them, and every worker must collect the same names."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


@pytest.fixture(scope="module")
def as_for_users() -> Iterator[None]:
    """Without the shortcuts of `quick` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        usual(patch)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a byte tokenizer and a ChatML template."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that moves the tiny model."""
    return make_adapter(tiny_model, tmp_path_factory.mktemp("adapters") / "one", seed=3)


@pytest.fixture(scope="session")
def chat(tiny_model: Path) -> Chat:
    """Its tokenizer and template."""
    return load_chat(tiny_model)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    return make_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="session")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `train` on the tiny model, with an adapter; its pairs are beside it, in `p`."""
    from tests.stages.train import data  # noqa: PLC0415  (it brings torch)

    root = tmp_path_factory.mktemp("trained")
    return data.train(tiny_model, root / "p", root / "t")


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    """Six prompts for training and three held out."""
    path = tmp_path / "prompts.jsonl"
    topics = [("kettle", "train"), ("owl", "train"), ("bread", "train"), ("rain", "train"), ("salt", "train")]
    topics += [("harp", "train"), ("moss", "heldout"), ("tram", "heldout"), ("clay", "heldout")]
    rows = [
        {"messages": [{"role": "user", "content": f"Tell me about {t}."}], "answer": t, "split": s} for t, s in topics
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def forged() -> Iterator[Forge]:
    """The process from which commands are forked; it has imported torch already."""
    with forge(*TRAIN, *COMMANDS) as running:
        yield running


@pytest.fixture(scope="session")
def cli(forged: Forge) -> Cli:
    """Run `prefpipe ARGUMENTS` in a process; `env` adds environment variables, `cwd` is where it runs.

    The process is forked from one that has imported everything: what an interpreter does when it starts is not tested
    by it. See `shell`.
    """
    return through(forged)


def through(forged: Forge) -> Cli:
    """The command line in children of this process."""

    def run(
        *arguments: object, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        ended = forged.run(*arguments, env={"OMP_NUM_THREADS": "1", **(env or {})}, cwd=cwd)
        return subprocess.CompletedProcess(["prefpipe", *map(str, arguments)], ended.code, ended.stdout, ended.stderr)

    return run


@pytest.fixture(scope="session")
def shell() -> Cli:
    """As `cli`, in an interpreter of its own: `python -m prefpipe ARGUMENTS`, as a user's shell starts it."""

    def run(
        *arguments: object, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "prefpipe", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd or ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            timeout=PATIENCE_S,
        )

    return run


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Make a JSONL file of rows; a text is written as it is."""

    def call(*rows: Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
        return path

    return call


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """`prefpipe ARGUMENTS` in this process: the command line without the start of an interpreter."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["prefpipe", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            command_line.main()
        return Ended(end.value.code if isinstance(end.value.code, int) else 0, capsys.readouterr().err)

    yield run
    for number, handler in kept.items():
        signal.signal(number, handler)
