"""The trained policy of a complete run, found again: for what comes after the training."""

from dataclasses import dataclass
from pathlib import Path

from prefpipe.config import base
from prefpipe.config.train import TrainConfig
from prefpipe.errors import IdentityError
from prefpipe.models import policy
from prefpipe.models.policy import Policy
from prefpipe.runs import manifests, store, trained
from prefpipe.runs.store import Manifest


@dataclass(frozen=True)
class Result:
    """A run of `train` and its policy: the base with the adapter, or the whole model."""

    run_dir: Path
    manifest: Manifest
    config: TrainConfig
    policy: Policy


def find(directory: Path, model: str = "") -> Result:
    """The policy of a run of `train`, of the best round of a run of `iterate`, or of the folder of one in such a run.
    `model` is the base, where it is not under the name that the run was started with.

    Raises MissingInputError for an incomplete run, UsageError for one of another command, DataError for a damaged
    policy, IdentityError for another base.
    """
    run_dir, _ = trained.place_of(directory)
    manifest = store.read_manifest(run_dir)
    if manifest["command"] != "train":
        raise manifests.other_kind(run_dir, manifest["command"], "train, or of iterate for its best round")
    config = base.load(TrainConfig, run_dir / "config.json", {"model": model} if model else {})
    folder = "adapter" if config.tuning == "lora" else "model"
    trained.check_files(run_dir, manifest, folder)
    place = str(run_dir / folder)
    found = policy.resolve(config.model, place) if config.tuning == "lora" else policy.resolve(place)
    if found.id != manifest["identity"]["policy"]:
        raise IdentityError(
            f"{run_dir} trained {manifest['identity']['policy']}, but its files and the model are {found.id}",
            "name the model that the run was started with: --model DIR",
        )
    return Result(run_dir, manifest, config, found)
