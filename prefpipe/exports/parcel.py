"""The files of a complete run that go to a repository: a model or an adapter of `train`, the rows of `build-pairs`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from prefpipe import reading
from prefpipe.config import base
from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.errors import UsageError
from prefpipe.exports import cards
from prefpipe.runs import manifests, store, trained

_CARD = "README.md"
_REPORT = "data_report.json"
_RENAMED = (_CARD, "adapter_config.json", "config.json")  # where the name of the base model stands
# Texts of a run that may name its settings; tokenizers and templates are those of the base model.
_READ = (*_RENAMED, _REPORT, "prefpipe.json", "generation_config.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Item:
    """A file by its name in the repository: the bytes of `path`, or a text in place of them."""

    name: str
    path: Path
    text: str | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size if self.text is None else len(self.text.encode())


@dataclass(frozen=True)
class Parcel:
    """What a repository gets, and of which kind it is."""

    kind: Literal["model", "dataset"]
    items: list[Item]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(item.size for item in self.items)


def pack(directory: Path, base_model: str = "") -> Parcel:
    """The files of a run of `train` (its adapter or model, or the folder of them that `directory` is), of the best
    round of `iterate`, or of a run of `build-pairs`. `base_model` is the hub's name of the model under an adapter.

    Raises MissingInputError for an incomplete run, DataError for a damaged one, UsageError for a run with nothing to
    push, and where a card would show a key or a place on this machine.
    """
    run_dir, folder = trained.place_of(directory)
    manifest = store.read_manifest(run_dir)
    if manifest["command"] == "train":
        parcel = Parcel("model", _policy(run_dir, manifest, folder, base_model))
    elif manifest["command"] == "build-pairs" and not base_model:
        parcel = Parcel("dataset", _rows(run_dir, manifest))
    elif base_model:
        raise UsageError(f"--base-model = {base_model}: {run_dir} holds no policy", "leave it out")
    else:
        raise manifests.other_kind(run_dir, manifest["command"], "train or build-pairs, or of iterate for its best")
    for item in parcel.items:
        if item.name in _READ:
            cards.check_open(item.name, reading.read_text(item.path) if item.text is None else item.text)
    return parcel


def _policy(run_dir: Path, manifest: Mapping[str, Any], folder: str, base_model: str) -> list[Item]:
    folder = folder or next(f for f in trained.FOLDERS if any(name.startswith(f"{f}/") for name in manifest["files"]))
    names = trained.check_files(run_dir, manifest, folder)
    if not names:
        raise UsageError(f"{run_dir} has no {folder}/ in its manifest", "name the run itself")
    card = reading.read_text(run_dir / folder / _CARD)
    old = cards.base_of(card)
    if base_model and cards.HUB_NAME.fullmatch(base_model) is None:
        raise UsageError(f"--base-model = {base_model} is no name of the hub", "write OWNER/NAME")
    if not base_model and cards.is_local(old):
        raise UsageError(
            f"the card of {run_dir / folder} names the base model by a place on this machine: {old}",
            "say what others know it by: --base-model OWNER/NAME",
        )
    items: list[Item] = []
    for name in names:
        item = Item(name.removeprefix(f"{folder}/"), run_dir / name)
        if base_model and item.name in _RENAMED:
            item = replace(item, text=cards.with_base(reading.read_text(item.path), old, base_model))
        items.append(item)
    return items


def _rows(run_dir: Path, manifest: Mapping[str, Any]) -> list[Item]:
    """The Parquet files of all datasets, the report about them, and a card; what was dropped stays here."""
    config = base.load(BuildPairsConfig, run_dir / "config.json", {})
    folders = [f for f in store.datasets(dict(manifest)) if f != "dropped"]
    main = {config.output, "trl"}
    folders.sort(key=lambda folder: folder not in main)
    names = [name for folder in folders for name in trained.check_files(run_dir, manifest, folder)]
    text = cards.dataset_card(config, manifest, folders)
    report = [Item(_REPORT, run_dir / _REPORT)] if trained.check_files(run_dir, manifest, _REPORT) else []
    return [Item(_CARD, run_dir / "manifest.json", text), *report, *(Item(name, run_dir / name) for name in names)]
