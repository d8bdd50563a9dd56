"""Settings of `prefpipe plan`: those of the training that it predicts, and the machine to predict it for."""

from typing import Annotated, ClassVar

from pydantic import Field

from prefpipe.config.base import RUNTIME, Heading
from prefpipe.config.train import TrainConfig


class PlanConfig(TrainConfig):
    """Predict memory, tokens, steps and time of a training run, here or on other GPUs."""

    HEADINGS: ClassVar[tuple[str, ...]] = ("Machine", *TrainConfig.HEADINGS)

    gpus: Annotated[int, RUNTIME, Field(ge=0, le=4096), Heading("Machine")] = 0
    """Predict the memory of a rank for 1, 2, 4, ... up to so many GPUs from config.json, without the weights. 0
    measures a step on this machine; where it cannot, because it does not hold the weights, it predicts for up to 64."""
    gpu_memory: Annotated[float, RUNTIME, Field(ge=0)] = 0.0
    """Memory of such a GPU in GiB; 0 takes that of the GPU here, or 80 where there is none."""

    @property
    def training(self) -> TrainConfig:
        """The settings of the training run, without those of the machine."""
        return TrainConfig.model_construct(**{name: getattr(self, name) for name in TrainConfig.model_fields})
