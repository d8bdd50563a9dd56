"""`prefpipe merge RUN --out DIR`: the adapter of a complete run in the weights of its base, as one model.

DIR holds what `train --merge` writes to RUN/merged, byte for byte.
"""

from pathlib import Path
from typing import Any

from prefpipe import log
from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError, MissingInputError, UsageError
from prefpipe.models import fingerprint, policy
from prefpipe.models.policy import Policy
from prefpipe.runs.store import Manifest
from prefpipe.stages.train import outputs, results

_OTHER_OUT = "choose an empty or a new --out"


def run(directory: Path, out: Path, model: str = "") -> str:
    """Merge an adapter into `out`: of a run of `train`, of the best round of a run of `iterate`, or the folder of one
    in such a run. `model` is the base, where it is not under the name that the run was started with. Returns the
    identity of the merged model.

    Raises UsageError for a run without an adapter and for an `out` that holds something else, DataError for a damaged
    adapter, IdentityError for another base.
    """
    found = results.find(directory, model)
    config = found.config
    if config.tuning != "lora":
        raise UsageError(
            f"{found.run_dir} trained every weight: there is no adapter to merge", f"{found.run_dir}/model is whole"
        )
    if _is_there(out, found.policy):
        log.info(f"{out} is complete already")
    else:
        facts = _facts(found.manifest, config)
        outputs.publish_merged(out, found.run_dir / "adapter", found.policy, config, facts, None)
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
