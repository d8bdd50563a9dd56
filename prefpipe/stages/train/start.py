"""How the policy stands to the reference before step 0: equal to the bit, equal up to kernel noise, or not equal.

The alert A0 compares the log-ratios and the loss of step 0 with this.
"""

from dataclasses import dataclass

from prefpipe.config.train import TrainConfig
from prefpipe.forward import load
from prefpipe.stages.train.inputs import TrainingData
from prefpipe.stages.train.reference import audit
from prefpipe.stages.train.reference.values import AuditResult


@dataclass(frozen=True)
class Start:
    """`exact`: every log-ratio is 0. `noise`: the policy computes as the reference does, up to this standard deviation
    of the log-prob of a token (nats); None where it does not."""

    exact: bool
    noise: float | None


def start_of(data: TrainingData, config: TrainConfig, audited: AuditResult) -> Start:
    """The start of a run, from the identities of policy and reference, the settings, and what the audit measured."""
    if audited.report is None or not _is_reference(data, config):
        return Start(exact=False, noise=None)
    full_precision = config.dtype == "float32" and not config.load_in_4bit
    if full_precision and data.scorers <= {load.scorer_name("float32")}:  # this forward pass computed both sides
        return Start(exact=True, noise=0.0)
    noise = audit.noise_between_kernels(audited.report["deviation"], full_precision=full_precision)
    return Start(exact=False, noise=noise)


def _is_reference(data: TrainingData, config: TrainConfig) -> bool:
    """Whether the initial policy is the reference and computes as it does. Dropout before an adapter that is trained on
    moves step 0; a new adapter adds nothing yet, with dropout or without."""
    moved = config.lora_dropout > 0 and data.policy.adapter is not None
    return data.reference is not None and data.reference.id == data.policy.id and not moved
