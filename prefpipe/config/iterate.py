"""Settings of `prefpipe iterate`: one table per stage."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from prefpipe.config import shared
from prefpipe.config.base import ADDED, RUNTIME, STRICT
from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.generate import GenerateConfig
from prefpipe.config.train import TrainConfig

# Table -> settings that `iterate` fills in itself, since they link the stages.
_LINKS = {
    "generate": ("model", "adapter", "reference"),
    "build_pairs": ("completions", "reward_runs", "ref_logps", "policy_logps"),
    "train": ("model", "adapter", "pairs", "labels", "groups", "ref_logps", "reference_model", "reference_adapter"),
    "evaluate": ("model", "adapter", "round"),
}


class IterateConfig(BaseModel):
    """Rounds of generate, build-pairs, train and evaluate; a round starts from the policy of the round before."""

    model_config = STRICT

    model: shared.Model = shared.DEFAULT_MODEL
    rounds: Annotated[int, Field(ge=1)] = 2
    """Rounds after the evaluation of the policy before training."""
    reference: Literal["previous", "base"] = "previous"
    """Reference model of a round: the policy that it starts from, whose log-probs come with its samples at no cost, or
    the base model (the policy with its adapter off)."""
    report: Annotated[bool, ADDED, RUNTIME] = False
    """Write OUT/report.html after every evaluation, so that the rounds can be watched."""
    generate: GenerateConfig = GenerateConfig()
    build_pairs: BuildPairsConfig = BuildPairsConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _tables_leave_links_alone(self) -> "IterateConfig":
        for table, names in _LINKS.items():
            settings = getattr(self, table)
            changed = [n for n in names if getattr(settings, n) != type(settings).model_fields[n].default]
            if changed:
                raise ValueError(f"iterate links the stages itself: remove {', '.join(changed)} from [{table}]")
        if self.train.tuning == "full" and self.reference == "base":
            raise ValueError("reference = base needs an adapter to turn off: train.tuning = full has none")
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> "IterateConfig":
        kind = self.train.objective.kind
        if kind != self.build_pairs.output:
            raise ValueError(f'loss {self.train.loss_type[0]} trains on {kind}: set output = "{kind}" in [build_pairs]')
        if self.build_pairs.format != "prefpipe":
            raise ValueError(f"format = {self.build_pairs.format} in [build_pairs] is for TRL: leave it out")
        return self
