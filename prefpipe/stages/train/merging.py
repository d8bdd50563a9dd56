"""`prefpipe merge RUN --out DIR`: the adapter of a complete run in the weights of its base, as one model.

DIR holds what `train --merge` writes to RUN/merged, byte for byte.
"""

from pathlib import Path
from typing import Any

from prefpipe import log
from prefpipe.config import base
from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError, IdentityError, MissingInputError, UsageError
from prefpipe.models import fingerprint, policy
from prefpipe.models.policy import Policy
from prefpipe.runs import store, trained
from prefpipe.runs.store import Manifest
from prefpipe.stages.train import outputs

_OTHER_OUT = "choose an empty or a new --out"


def run(directory: Path, out: Path, model: str = "") -> str:
    """Merge an adapter into `out`: of a run of `train`, of the best round of a run of `iterate`, or the folder of one
    in such a run. `model` is the base, where it is not under the name that the run was started with. Returns the
    identity of the merged model.

    Raises UsageError for a run without an adapter and for an `out` that holds something else, DataError for a damaged
    adapter, IdentityError for another base.
    """
    run_dir, _ = trained.place_of(directory)
    manifest = store.read_manifest(run_dir)
    if manifest["command"] != "train":
        raise UsageError(
            f"{run_dir} is a run of {manifest['command']}: it has no adapter", "name a run of `prefpipe train`"
        )
    config = base.load(TrainConfig, run_dir / "config.json", {"model": model} if model else {})
    if config.tuning != "lora":
        raise UsageError(f"{run_dir} trained every weight: there is no adapter to merge", f"{run_dir}/model is whole")
    adapter = run_dir / "adapter"
    trained.check_files(run_dir, manifest, "adapter")
    merged = policy.resolve(config.model, str(adapter))
    if merged.id != manifest["identity"]["policy"]:
        raise IdentityError(
            f"{run_dir} trained {manifest['identity']['policy']}, but adapter and model are {merged.id}",
            "name the model that the run was started with: --model DIR",
        )
    if _is_there(out, merged):
        log.info(f"{out} is complete already")
    else:
        facts = _facts(manifest, config)
        outputs.publish_merged(out, adapter, merged, config, facts, None)
    return policy.resolve(str(out)).id


def _is_there(out: Path, merged: Policy) -> bool:
    """Whether `out` holds this merged model. Raises UsageError where it holds something else."""
    if not out.exists() and not out.is_symlink():
        return False
    if not out.is_dir():
        raise UsageError(f"{out} is not a directory", _OTHER_OUT)
    if not any(out.iterdir()):
        return False
    try:
        weights = fingerprint.weights_digest(out)
        record = (out / "prefpipe.json").read_text(encoding="utf-8")
    except (DataError, MissingInputError, OSError, ValueError):
        weights, record = "", ""
    if record != policy.merged_record(merged.weights, str(merged.adapter_weights), weights):
        raise UsageError(f"{out} is not empty and is not this merged model", _OTHER_OUT)
    return True


def _facts(manifest: Manifest, config: TrainConfig) -> dict[str, Any]:
    """What the model card says beside the settings, as it was when the run ended."""
    totals, kind = manifest["totals"], config.objective.kind
    return {**totals, **manifest["identity"], "count": totals[kind], "kind": kind, "inputs": manifest["inputs"]}
