"""The command line: parse, call one stage, render errors. No logic.

Heavy packages load only inside the command that needs them: `prefpipe --help` imports none of them.
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
    """Run the command line and leave with the exit code of DESIGN: errors are two lines, never a traceback."""
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _stop)
    # Threads that wait by spinning starve each other on a busy machine: vLLM is 6 to 12 times slower (docs/LOG.md).
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
    extra = {"vllm": "cpu] or prefpipe[cuda"}.get(error.name or "", "train")
    log.error(f"this command needs the package '{error.name}'", f"install it with: pip install 'prefpipe[{extra}]'")
    return _failed(MissingInputError.exit_code)


def _failed(code: int) -> int:
    """The exit code of an error. Under torchrun the process ends here and now: while the error is cleared away, DDP
    would wait for ranks that wait for this one; torchrun ends the others as soon as this one is gone."""
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
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,  # noqa: FBT002
) -> None:
    """Offline preference optimization: generate, score, build-pairs, train, evaluate, iterate."""


@app.command("config")
def show_config(
    command: Annotated[str, typer.Argument(help=f"One of: {', '.join(STAGES)}.")],
) -> None:
    """Print the documented default recipe of a command."""
    if command not in STAGES:
        raise UsageError(
            f"no command '{command}'{base.suggestion(command, list(STAGES))}", f"commands are {', '.join(STAGES)}"
        )
    config_class, _ = STAGES[command]
    typer.echo(f"# prefpipe {command} RECIPE.toml --out DIR\n# {config_class.__doc__}\n")
    typer.echo(base.to_toml(config_class()))


def _register(name: str, config_class: type[BaseModel], module: str) -> None:
    def run(recipe: Path | None, given: Mapping[str, Any], *, out: Path | None, force: bool, dry_run: bool) -> None:
        config = base.load(config_class, recipe, given)
        if dry_run:
            typer.echo(json.dumps(base.dump(config), indent=2))
            return
        if out is None:
            raise UsageError("--out is missing", f"say where the run lives: prefpipe {name} ... --out runs/NAME")
        stage = importlib.import_module(module)
        manifest = stage.run(config, out, force=force)
        if os.environ.get("RANK", "0") == "0":
            for line in stage.summary(manifest, out):
                typer.echo(line)

    app.command(name, cls=flags.SettingsCommand)(flags.command(config_class, run))


def _plan(recipe: Path | None, given: Mapping[str, Any], *, out: Path | None, force: bool, dry_run: bool) -> None:
    """What a training run will cost. Writes nothing, so that --out and --force have nothing to do."""
    if out is not None or force or dry_run:
        raise UsageError("plan writes nothing", "leave out --out, --force and --dry-run")
    for line in importlib.import_module("prefpipe.stages.train.plan").run(base.load(TrainConfig, recipe, given)):
        typer.echo(line)


for _name, (_config, _module) in STAGES.items():
    _register(_name, _config, _module)
app.command("plan", cls=flags.SettingsCommand, help="Predict memory, tokens, steps and time of a training run.")(
    flags.command(TrainConfig, _plan)
)
