"""Runs of all parts -> the run that one command without `part` makes, to the byte.

    prefpipe gather runs/g-1 runs/g-2 --out runs/g

1. Check that the runs are all parts of one command: complete, each once, with the same settings, inputs and versions.
2. Open DIR as the run of that command.
3. Put every shard in its place: a shard of score is a file of its part, one of generate or evaluate has rows of all.
4. The caller runs the command on DIR: every shard is there, so it counts and writes the manifest. What parts do not
   share it does itself: the parity check, and what evaluate is asked for beside the answers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from pydantic import BaseModel

from prefpipe.config.commands import CLASSES
from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.generate import GenerateConfig
from prefpipe.runs import saved_config, store
from prefpipe.runs.resume import RowInputs
from prefpipe.runs.store import Run
from prefpipe.stages.gather import files, parts, rows


def run(directories: Sequence[Path], out: Path, *, force: bool) -> tuple[str, BaseModel]:
    """Put the shards of all parts into `out`. Returns the command that finishes the run there, and its settings.

    Raises UsageError for runs that are not all parts of one command, MissingInputError for one that is not complete,
    DataError for a damaged one.
    """
    found = parts.read(directories, out)
    first = found[0]
    cls = CLASSES[first.command]
    config = cls.model_validate(
        {**saved_config.settings(first.directory / "config.json", cls, first.saved["config"]), "part": "1/1"}
    )
    place: Callable[[Run], None]
    if isinstance(config, GenerateConfig | EvaluateConfig):
        prompts = rows.prompts_of(config)
        config = config.model_copy(update={"shard_rows": rows.shard_size(found, prompts)})
        place = rows.Interleaved(found, prompts, config).place
    else:
        place = partial(files.place, found)
    names = [name.removeprefix("input:") for name in first.saved["row_inputs"]]
    by_row = RowInputs(names, lambda _saved: ())
    with store.open_run(out, first.command, config, first.manifest["inputs"], force=force, by_row=by_row) as whole:
        place(whole)
    return first.command, config
