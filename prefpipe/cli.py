"""The command line: parse the options, make one call of `api.calls`, print what it says. No logic."""

import gc
import importlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from prefpipe import __version__, flags, log, processes, terminal
from prefpipe.api import calls
from prefpipe.api.calls import STAGES
from prefpipe.chat.commands import chat
from prefpipe.config import base
from prefpipe.config.commands import SETTINGS
from prefpipe.config.iterate import IterateConfig
from prefpipe.config.plan import PlanConfig
from prefpipe.doctor import command as doctors
from prefpipe.errors import Interrupted, PrefpipeError, UsageError
from prefpipe.exports.commands import export, push
from prefpipe.shipped import commands as _recipe_commands
from prefpipe.shipped import recipes
from prefpipe.views.commands import compare, runs, show

_AGAIN_AFTER_S = 0.02  # a destructor has ended by then, mostly
app = typer.Typer(
    cls=flags.Commands,
    context_settings=flags.CONTEXT,
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog=flags.EXAMPLE,
)


def main() -> None:
    """Run the command line and exit with one of the codes in `prefpipe.errors`.

    An error is two lines on stderr, `error:` and `hint:`. `--verbose` adds the traceback of an unexpected one.
    """
    signal.signal(signal.SIGTERM, _stop)
    for number in (signal.SIGINT, signal.SIGHUP):  # nohup ignores the second
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    sys.unraisablehook = _dropped
    processes.wait_passively()
    verbose = "--verbose" in sys.argv
    try:
        code = app(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except (SystemExit, BrokenPipeError, terminal.OutputClosed):  # SystemExit: typer finds that nobody reads its help
        terminal.forget(sys.stdout)
        code = terminal.OutputClosed.exit_code
    except BaseException as error:  # polars panics derive from BaseException
        code = _failed(_report(error, verbose=verbose))
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: BaseException, *, verbose: bool) -> int:
    """Print the two lines of an error. Returns its exit code."""
    if isinstance(error, typer.TyperException):
        log.error(*flags.mistake(error))
        return UsageError.exit_code
    if isinstance(error, PrefpipeError | Interrupted):
        log.error(error.message, error.hint)
        return error.exit_code
    if isinstance(error, OSError):
        terminal.forget(sys.stdout)
    if explained := calls.explained(error):
        log.error(explained.message, explained.hint)
        return explained.exit_code
    if verbose:
        traceback.print_exc()
    log.error(
        f"unexpected {type(error).__name__}: {error}",
        "`prefpipe doctor` checks the installation; if it is whole, run again with --verbose and report the traceback",
    )
    return 1


def _stop(number: int, frame: FrameType | None) -> None:
    """Raise Interrupted; inside `_dropped` nobody would see it, and the signal comes again when that has ended."""
    while frame is not None:
        if frame.f_code is _dropped.__code__:
            _send_again(number)
            return
        frame = frame.f_back
    raise Interrupted(number)


def _dropped(unraisable: "sys.UnraisableHookArgs") -> None:
    """What Python does with an error in a destructor or a callback, which nothing can catch. A signal that fell into
    one would be lost: it is sent again."""
    if isinstance(unraisable.exc_value, Interrupted):
        _send_again(unraisable.exc_value.exit_code - 128)
    else:
        sys.__unraisablehook__(unraisable)


def _send_again(number: int) -> None:
    soon = threading.Timer(_AGAIN_AFTER_S, os.kill, (os.getpid(), number))
    soon.daemon = True
    soon.start()


def _failed(code: int) -> int:
    """The exit code of an error. Under torchrun the process ends in this function.

    A normal exit destroys DDP's process group, which waits for the other ranks, which wait for this one. Once this
    process is gone, torchrun stops the others.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    return code


def _version(value: bool) -> None:  # noqa: FBT001  (typer's callback signature)
    if value:
        terminal.show(f"prefpipe {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,  # noqa: FBT002, ARG001
) -> None:
    """Offline preference optimization (DPO and relatives): generate, score, build-pairs, train, evaluate, iterate."""
    if context.invoked_subcommand is None:
        for line in context.get_help().splitlines():
            log.info(line)
        raise UsageError("no command is named", "start with `prefpipe demo`, or with a command of the list above")


def show_config(
    command: Annotated[str, typer.Argument(metavar="COMMAND", help=f"One of: {', '.join(SETTINGS)}.")],
    *,
    schema: Annotated[bool, typer.Option("--schema", help="Print a JSON Schema of its recipes for editors.")] = False,
) -> None:
    """Print a recipe with every setting of a command: its meaning and its default."""
    if command not in SETTINGS:
        raise UsageError(
            f"no command '{command}'{base.suggestion(command, list(SETTINGS))}",
            f"the commands are {', '.join(SETTINGS)}",
        )
    config_class = SETTINGS[command]
    if schema:
        terminal.show(json.dumps(base.json_schema(config_class), indent=2))
        return
    terminal.show(f"# prefpipe {command} RECIPE.toml{' --out DIR' * (command in STAGES)}\n# {config_class.__doc__}\n")
    terminal.show(base.to_toml(config_class()))


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")] = False,  # noqa: FBT002
) -> int:
    """Check this installation: what works, and what to do about the rest. Exit code 1 where something is broken."""
    return doctors.run(as_json=as_json)


@app.command("steps", hidden=True)
def steps() -> None:
    """Run the steps that another process names on stdin, one line of JSON each, and answer with a line when it is done.

    {"saved": CONFIG.json, "out": DIR, "keep": true, "lora_rank": 8} leaves the engine open for the next step, with room
    for adapters of that rank. stdout has the answers alone; what a step prints goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warm = importlib.import_module("prefpipe.inference.warm")
    with warm.shelf() as shelf:
        for line in sys.stdin:
            step = json.loads(line)
            saved, out = Path(step["saved"]), Path(step["out"])
            shelf.keep, shelf.lora_rank = step["keep"], step["lora_rank"]
            command = json.loads(saved.read_text(encoding="utf-8"))["command"]
            _run(command, calls.settings(command, saved, {}), out)
            gc.collect()  # a reward model of this step leaves the memory before that of the next one comes
            print(step["out"], file=answers, flush=True)
        processes.leave_garbage()
    processes.end()


def write_report(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="The --out of a command, finished or not.")],
    out: Annotated[str | None, typer.Option(metavar="PATH", help="The page; DIR/report.html without it.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help=flags.VERBOSE)] = False,  # noqa: FBT002, ARG001
) -> None:
    """Write one HTML page about a run, or about all rounds of iterate."""
    target = base.local_path(out, "out") if out is not None else None
    terminal.show(f"report       {calls.report(base.local_path(directory, 'DIR'), target)}")


def gather(
    directories: Annotated[list[str], typer.Argument(metavar="DIR...", help="The --out of every part, 1/N to N/N.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="The directory of the whole run.")],
    force: Annotated[bool, typer.Option("--force", help=flags.FORCE)] = False,  # noqa: FBT002
    verbose: Annotated[bool, typer.Option("--verbose", help=flags.VERBOSE)] = False,  # noqa: FBT002, ARG001
) -> None:
    """Join the runs of all parts (--part I/N) of generate, score or evaluate into the run that one command makes."""
    target = base.local_path(out, "out")
    _say(*calls.gather([base.local_path(text, "DIR") for text in directories], target, force=force), target)


def merge(
    run_dir: Annotated[str, typer.Argument(metavar="RUN", help="A run of train, or of iterate for its best round.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="The merged model; a new or an empty directory.")],
    model: Annotated[str, typer.Option(help="The base, if it is not where it was when the run started.")] = "",
    verbose: Annotated[bool, typer.Option("--verbose", help=flags.VERBOSE)] = False,  # noqa: FBT002, ARG001
) -> None:
    """Merge the adapter of a run into the weights of its base: a model for tools that take no adapters."""
    target = base.local_path(out, "out")
    identity = calls.merge(base.local_path(run_dir, "RUN"), target, model)
    terminal.show(f"merged       {target}\n  {identity}")


def _stage(name: str, config_class: type[BaseModel]) -> Callable[..., None]:
    def run(recipe: Path | None, settings: Mapping[str, Any], *, out: Path | None, force: bool, dry_run: bool) -> None:
        config = calls.settings(name, recipe, settings)
        if dry_run:
            terminal.show(json.dumps(base.dump(config), indent=2))
            return
        if out is None:
            raise UsageError("--out is missing", f"name the directory of the run: prefpipe {name} ... --out runs/NAME")
        _run(name, config, out, force=force)

    return flags.command(config_class, run)


def _run(command: str, config: BaseModel, out: Path, *, force: bool = False) -> None:
    _say(command, calls.run(command, config, out, force=force), out)


def _say(command: str, manifest: dict[str, Any], out: Path) -> None:
    if os.environ.get("RANK", "0") == "0":
        for line in calls.summary(command, manifest, out):
            terminal.show(line)


def _demo(recipe: Path | None, settings: Mapping[str, Any], *, out: Path | None, force: bool, dry_run: bool) -> None:
    if recipe is not None:
        raise UsageError("demo has a recipe already", f"run yours with: prefpipe iterate {recipe} --out runs/NAME")
    config, out = recipes.demo(settings), out or Path("runs/demo")
    if dry_run:
        terminal.show(json.dumps(base.dump(config), indent=2))
        return
    _run("iterate", config, out, force=force)
    write_report(str(out))


def _plan(recipe: Path | None, settings: Mapping[str, Any], *, out: Path | None, force: bool, dry_run: bool) -> None:
    if out is not None or force:
        raise UsageError("plan writes nothing", "leave out --out and --force")
    config = calls.settings("plan", recipe, settings)
    for line in [json.dumps(base.dump(config), indent=2)] if dry_run else calls.plan(config):
        terminal.show(line)


def _register(heading: str, **commands: Callable[..., Any]) -> None:
    for name, function in commands.items():
        app.command(name, cls=flags.Command, rich_help_panel=heading, epilog=flags.example(name))(function)


_register(
    "Start",
    doctor=doctor,
    demo=flags.command(
        IterateConfig,
        _demo,
        "Run three rounds on a real 135M model, and write the page about them: about 10 minutes on 2 cores.\n\n"
        "`prefpipe demo --dry-run` prints its settings, and every option of `prefpipe iterate` changes one.",
        hidden={"recipe", *(name for name, _ in base.fields(IterateConfig))},
    ),
)
_recipe_commands.register(app, "Start", flags.Commands, flags.Command)
_register("Stages", **{name: _stage(name, config) for name, (config, _) in STAGES.items()}, gather=gather)
_register("Settings", config=show_config, plan=flags.command(PlanConfig, _plan, hidden={"out", "force"}))
_register("Look", show=show, runs=runs, compare=compare, report=write_report, chat=chat)
_register("Share", merge=merge, export=export, push=push)
