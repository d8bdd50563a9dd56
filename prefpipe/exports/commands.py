"""The options of the commands `push` and `export`. Each command imports its module when it runs."""

import importlib
import re
from typing import Annotated

import typer

from prefpipe import flags, log, terminal
from prefpipe.config import base
from prefpipe.errors import UsageError

_TARGET = re.compile(r"hf:([\w-][\w.-]*/[\w-][\w.-]*)", re.ASCII)
FORMATS = ["gguf", "axolotl", "llama-factory", "nemo-rl"]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run of train or build-pairs, or of iterate for its best.")]


def push(
    run_dir: Run,
    target: Annotated[str, typer.Argument(metavar="hf:OWNER/NAME", help="The repository on the hub.")],
    *,
    public: Annotated[bool, typer.Option("--public", help="Everybody may see it.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Only OWNER may see it.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Add a commit to a repository that is there.")] = False,
    base_model: Annotated[str, typer.Option(metavar="OWNER/NAME", help="The base of an adapter, on the hub.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, and send nothing.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help=flags.VERBOSE)] = False,  # noqa: ARG001
) -> None:
    """Send an adapter, a model or pairs with their card to the hub, where --public or --private says so."""
    found = _TARGET.fullmatch(target)
    if found is None:
        raise UsageError(f"{target} names no repository", "write hf:OWNER/NAME")
    if public == private:
        raise UsageError("say who may see it: --public or --private", "push sends nothing unless one of them is there")
    upload = importlib.import_module("prefpipe.exports.upload").pack(base.local_path(run_dir, "RUN"), base_model)
    size = importlib.import_module("prefpipe.views.drawing").size
    show = terminal.show if dry_run else log.info
    for file in upload.files:
        show(f"  {size(file.size):>8}  {file.name}")
    show(
        f"{len(upload.files)} files, {size(upload.size)}, to the {'private' if private else 'public'} {upload.kind} "
        f"repository {found[1]}"
    )
    if dry_run:
        show("nothing was sent: leave out --dry-run to send it")
        return
    hub = importlib.import_module("prefpipe.exports.hub")
    terminal.show(f"pushed       {hub.send(upload, found[1], private=private, update=update)}")


def export(
    form: Annotated[str, typer.Argument(metavar="FORMAT", help=f"One of: {', '.join(FORMATS)}.")],
    run_dir: Annotated[str, typer.Argument(metavar="RUN", help="For gguf a run of train, else of build-pairs.")],
    *,
    out: Annotated[str, typer.Option(metavar="DIR", help="A new or an empty directory.")],
    model: Annotated[str, typer.Option(help="gguf: the base, if it is not where it was when the run started.")] = "",
    verbose: Annotated[bool, typer.Option("--verbose", help=flags.VERBOSE)] = False,  # noqa: ARG001
) -> None:
    """Write what a run made in the form that another program reads: its policy as GGUF, its rows for a trainer."""
    if form not in FORMATS:
        raise UsageError(f"no format '{form}'{base.suggestion(form, FORMATS)}", f"formats are {', '.join(FORMATS)}")
    directory, target = base.local_path(run_dir, "RUN"), base.local_path(out, "out")
    if form == "gguf":
        written = importlib.import_module("prefpipe.exports.gguf_model").export(directory, target, model)
        terminal.show(f"exported     {written}")
        return
    if model:
        raise UsageError(f"--model = {model}: {form} is made of rows", "leave it out")
    count, dataset = importlib.import_module("prefpipe.exports.rows").export(form, directory, target)
    terminal.show(f"exported     {count} {dataset} to {target}")
