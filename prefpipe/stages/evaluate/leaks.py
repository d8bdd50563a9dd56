"""Prompts that a policy was trained on and is evaluated on: an error, since its pass rate would say nothing."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from prefpipe import log
from prefpipe.errors import DataError, UsageError
from prefpipe.ids import content_id
from prefpipe.runs import manifests, store
from prefpipe.schemas import Label, Message, Pair, Prompt, RankedGroup

# Dataset -> its row type, and the column with the messages of the prompt.
_DATASETS = {
    "prompts": (Prompt, "messages"),
    "pairs": (Pair, "prompt"),
    "labels": (Label, "prompt"),
    "groups": (RankedGroup, "prompt"),
}
_SHOWN = 5


def check(trained_on: Sequence[str], prompt_sets: Iterable[tuple[str, Iterable[Prompt]]]) -> None:
    """Raise DataError when a run of `trained_on` has a prompt of one of the sets; it names their ids. The sets come
    with the names of their files.

    Prompts are compared by the content of their messages: the expected answer, which is a part of their id, may differ.
    """
    if not trained_on:
        return
    held_out = {_key(p.messages): (p.prompt_id, file) for file, prompts in prompt_sets for p in prompts}
    for run in trained_on:
        leaked = sorted({held_out[key] for key in _trained(Path(run)) if key in held_out})
        if leaked:
            ids = ", ".join(prompt_id for prompt_id, _ in leaked[:_SHOWN])
            more = f" and {len(leaked) - _SHOWN} more" if len(leaked) > _SHOWN else ""
            raise DataError(
                f"{len(leaked)} of the prompts to evaluate on are among those that {run} trained on (in "
                f"{', '.join(sorted({file for _, file in leaked}))}): {ids}{more}",
                "take these prompts out of the file, or give prompts of another split",
            )
    log.info(f"none of {len(held_out)} prompts is among those of {', '.join(trained_on)}")


def _trained(run: Path) -> Iterator[str]:
    """What stands for the prompts of a run. Raises UsageError for a run without prompts."""
    manifest = store.read_manifest(run)
    there = [name for name in _DATASETS if name in manifests.datasets(manifest)]
    if not there:
        raise UsageError(
            f"trained_on = {run}: a run of {manifest['command']} holds no prompts",
            "give the runs of generate, score or build-pairs that the training read",
        )
    for dataset in there:
        row_type, column = _DATASETS[dataset]
        for name in store.part_names(run, manifest, dataset):
            table = store.read_file(run, manifest, name, row_type, ["prompt_id", column])
            messages = dict(zip(table["prompt_id"].to_pylist(), table[column].to_pylist(), strict=True))
            yield from map(_key, messages.values())


def _key(messages: Iterable[Message]) -> str:
    return content_id([(m["role"], m["content"], m.get("extra")) for m in messages])
