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
_RENAMED = (_CARD, "adapter_config.json", "config.json")  # files that contain the name of the base model
# Text files that may contain settings of the run. Tokenizer and template come from the base model.
_READ = (*_RENAMED, _REPORT, "prefpipe.json", "generation_config.json", "tokenizer_config.json")


@dataclass(frozen=True)
class UploadFile:
    """A file in a repository: its name there, and its content, which is `text` or else the bytes of `path`."""

    name: str
    path: Path
    text: str | None = None

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self.path.stat().st_size if self.text is None else len(self.text.encode())


@dataclass(frozen=True)
class Upload:
    """All files that go to a repository, and the kind of the repository."""

    kind: Literal["model", "dataset"]
    files: list[UploadFile]

    @property
    def size(self) -> int:
        """The size of all files in bytes."""
        return sum(file.size for file in self.files)


def pack(directory: Path, base_model: str = "") -> Upload:
    """The files to upload of a run of `train` (its adapter or model, or the folder `directory` with one of them), of
    the best round of `iterate`, or of a run of `build-pairs`. `base_model` is the name on the hub of the model under an
    adapter.

    Raises MissingInputError for an incomplete run, DataError for a damaged run, UsageError for a run with nothing to
    push, and where a file would show a key or a path of this machine.
    """
    run_dir, folder = trained.place_of(directory)
    manifest = store.read_manifest(run_dir)
    if manifest["command"] == "train":
        upload = Upload("model", _policy(run_dir, manifest, folder, base_model))
    elif manifest["command"] == "build-pairs" and not base_model:
        upload = Upload("dataset", _rows(run_dir, manifest))
    elif base_model:
        raise UsageError(f"--base-model = {base_model}: {run_dir} holds no policy", "leave it out")
    else:
        raise manifests.other_kind(run_dir, manifest["command"], "train or build-pairs, or of iterate for its best")
    for file in upload.files:
        if file.name in _READ:
            cards.check_open(file.name, reading.read_text(file.path) if file.text is None else file.text)
    return upload


def _policy(run_dir: Path, manifest: Mapping[str, Any], folder: str, base_model: str) -> list[UploadFile]:
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
    files: list[UploadFile] = []
    for name in names:
        file = UploadFile(name.removeprefix(f"{folder}/"), run_dir / name)
        if base_model and file.name in _RENAMED:
            file = replace(file, text=cards.with_base(reading.read_text(file.path), old, base_model))
        files.append(file)
    return files


def _rows(run_dir: Path, manifest: Mapping[str, Any]) -> list[UploadFile]:
    """The Parquet files of all datasets except the ledger, the data report, and a card."""
    config = base.load(BuildPairsConfig, run_dir / "config.json", {})
    folders = [f for f in manifests.datasets(dict(manifest)) if f != "dropped"]
    main = {config.output, "trl"}
    folders.sort(key=lambda folder: folder not in main)
    names = [name for folder in folders for name in trained.check_files(run_dir, manifest, folder)]
    text = cards.dataset_card(config, manifest, folders)
    report = [UploadFile(_REPORT, run_dir / _REPORT)] if trained.check_files(run_dir, manifest, _REPORT) else []
    return [
        UploadFile(_CARD, run_dir / "manifest.json", text),
        *report,
        *(UploadFile(name, run_dir / name) for name in names),
    ]
