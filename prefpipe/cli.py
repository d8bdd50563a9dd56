"""The command line: parse the options, call one stage, print what it says. No logic.

A stage and its heavy packages are imported by the command that runs it: `prefpipe --help` imports none of them.
"""

import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from prefpipe import __version__, flags, log
from prefpipe.config import base
from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.generate import GenerateConfig
from prefpipe.config.iterate import IterateConfig
from prefpipe.config.score import ScoreConfig
from prefpipe.config.train import TrainConfig
from prefpipe.errors import Interrupted, MissingInputError, PrefpipeError, UsageError

STAGES: dict[str, tuple[type[BaseModel], str]] = {
    "generate": (GenerateConfig, "prefpipe.stages.generate.stage"),
    "score": (ScoreConfig, "prefpipe.stages.score.stage"),
    "build-pairs": (BuildPairsConfig, "prefpipe.stages.build_pairs.stage"),
    "train": (TrainConfig, "prefpipe.stages.train.stage"),
    "evaluate": (EvaluateConfig, "prefpipe.stages.evaluate.stage"),
    "iterate": (IterateConfig, "prefpipe.stages.iterate.stage"),
}

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def main() -> None:
    """Run the command line and exit with one of the codes in `prefpipe.errors`.

    An error is two lines on stderr, `error:` and `hint:`. `--verbose` adds the traceback of an unexpected one.
    """
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _stop)
    # OpenMP threads that spin while they wait starve each other on a busy machine: vLLM is then 6 to 12 times slower
    # (docs/LOG.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    verbose = "--verbose" in sys.argv
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        log.error(error.format_message(), "see `prefpipe --help`, or `prefpipe COMMAND --help`")
        code = UsageError.exit_code
    except (PrefpipeError, Interrupted) as error:
        log.error(error.message, error.hint)
        code = _failed(error.exit_code)
    except ModuleNotFoundError as error:
        code = _missing_package(error)
    except SystemExit:
        raise
    except BaseException as error:  # polars panics derive from BaseException
        code = _unexpected(error, verbose=verbose)
    sys.stdout.flush()
    sys.exit(code if isinstance(code, int) else 0)


def _stop(number: int, _frame: FrameType | None) -> None:
    raise Interrupted(number)


def _missing_package(error: ModuleNotFoundError) -> int:
    extras = ("cpu", "cuda") if error.name == "vllm" else ("train",)
    commands = " or ".join(f"pip install 'prefpipe[{extra}]'" for extra in extras)
    log.error(f"this command needs the package '{error.name}'", f"install it with: {commands}")
    return _failed(MissingInputError.exit_code)


def _failed(code: int) -> int:
    """The exit code of an error. Under torchrun the process ends in this function.

    A normal exit destroys DDP's process group, which waits for the other ranks, which wait for this one. Once this
    process is gone, torchrun stops the others.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _unexpected(error: BaseException, *, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    log.error(f"unexpected {type(error).__name__}: {error}", "run again with --verbose and report the traceback")
    return _failed(1)


def _version(value: bool) -> None:  # noqa: FBT001  (typer's callback signature)
    if value:
        typer.echo(f"prefpipe {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,  # noqa: FBT002
) -> None:
    """Offline preference optimization: generate, score, build-pairs, train, evaluate, iterate."""


@app.command("config")
def show_config(
    command: Annotated[str, typer.Argument(help=f"One of: {', '.join(STAGES)}.")],
) -> None:
    """Print a recipe with every setting of a command: its meaning and its default."""
    if command not in STAGES:
        raise UsageError(
            f"no command '{command}'{base.suggestion(command, list(STAGES))}", f"the commands are {', '.join(STAGES)}"
        )
    config_class, _ = STAGES[command]
    typer.echo(f"# prefpipe {command} RECIPE.toml --out DIR\n# {config_class.__doc__}\n")
    typer.echo(base.to_toml(config_class()))


def _register(name: str, config_class: type[BaseModel], module: str) -> None:
    def run(recipe: Path | None, settings: Mapping[str, Any], *, out: Path | None, force: bool, dry_run: bool) -> None:
        config = base.load(config_class, recipe, settings)
        if dry_run:
            typer.echo(json.dumps(base.dump(config), indent=2))
            return
        if out is None:
            raise UsageError("--out is missing", f"name the directory of the run: prefpipe {name} ... --out runs/NAME")
        stage = importlib.import_module(module)
        manifest = stage.run(config, out, force=force)
        if os.environ.get("RANK", "0") == "0":
            for line in stage.summary(manifest, out):
                typer.echo(line)

    app.command(name, cls=flags.SettingsCommand)(flags.command(config_class, run))


def _plan(recipe: Path | None, settings: Mapping[str, Any], *, out: Path | None, force: bool, dry_run: bool) -> None:
    if out is not None or force or dry_run:
        raise UsageError("plan writes nothing", "leave out --out, --force and --dry-run")
    plan = importlib.import_module("prefpipe.stages.train.plan")
    for line in plan.run(base.load(TrainConfig, recipe, settings)):
        typer.echo(line)


for _name, (_config, _module) in STAGES.items():
    _register(_name, _config, _module)
app.command("plan", cls=flags.SettingsCommand, help="Predict memory, tokens, steps and time of a training run.")(
    flags.command(TrainConfig, _plan)
)
