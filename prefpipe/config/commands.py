"""The settings class of every command that has a recipe."""

from pydantic import BaseModel

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.generate import GenerateConfig
from prefpipe.config.iterate import IterateConfig
from prefpipe.config.plan import PlanConfig
from prefpipe.config.score import ScoreConfig
from prefpipe.config.sweep import SweepConfig
from prefpipe.config.train import TrainConfig

CLASSES: dict[str, type[BaseModel]] = {
    "generate": GenerateConfig,
    "score": ScoreConfig,
    "build-pairs": BuildPairsConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "iterate": IterateConfig,
    "sweep": SweepConfig,
}
SETTINGS: dict[str, type[BaseModel]] = {**CLASSES, "plan": PlanConfig}  # and that of the command without a run
