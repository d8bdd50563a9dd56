"""Settings of `prefpipe sweep`: those of train, which every variant has, and which of them vary."""

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from prefpipe.config import grid as grids
from prefpipe.config.base import RUNTIME, Heading
from prefpipe.config.grid import Variant
from prefpipe.config.train import TrainConfig

Metric = Literal["accuracy", "margin", "win_rate"]


class SweepConfig(TrainConfig):
    """Train variants of one recipe on the same rows, with one reference and one base model, and compare them."""

    HEADINGS: ClassVar[tuple[str, ...]] = ("Variants", *TrainConfig.HEADINGS)

    grid: Annotated[tuple[str, ...], RUNTIME, Heading("Variants")] = ()
    """Settings of train that vary, each as NAME=VALUE,VALUE (of a list: NAME=A,B+C for [A] and [B, C]; of texts with
    commas: a JSON list), or for samples a range: NAME=1e-6..1e-4, NAME=1e-6..1e-4:log. Every combination is a run
    OUT/variants/NAME-VALUE. With more values a sweep goes on."""
    samples: Annotated[int, RUNTIME, Field(ge=0)] = 0
    """Variants to draw from the grid (random search), by seed: more of them add to those before. 0 takes all."""
    halving: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], RUNTIME] = ()
    """Shares of the steps after which the better half of the variants goes on and the others stop (successive halving,
    Jamieson and Talwalkar 2016, arXiv:1502.07943), each at the next evaluation (eval_steps)."""
    metric_for_best_variant: Annotated[Metric, RUNTIME] = "accuracy"
    """What makes a variant the best, on held-out pairs: the share that the policy ranks right (accuracy), the mean
    margin over the reference in nats, whatever beta (margin); or its wins over the initial policy by evaluate
    (win_rate)."""
    evaluate: Annotated[str, RUNTIME] = ""
    """Recipe of evaluate for every variant and the initial policy: length, KL and win rate come from it."""
    workers: Annotated[Literal["auto"] | Annotated[int, Field(ge=1)], RUNTIME] = "auto"
    """Variants that are trained side by side, each process with a GPU and a base model of its own; auto: one for each
    visible GPU, without a GPU one."""

    @property
    def variants(self) -> list[Variant]:
        """The runs of the sweep."""
        return grids.variants(self, self.grid, self.samples)

    @property
    def resolved_variants(self) -> list[Variant]:
        """The runs of the sweep, with their learning rates as numbers."""
        return [replace(variant, config=variant.config.resolved) for variant in self.variants]

    @model_validator(mode="after")
    def _variants_fit(self) -> "SweepConfig":
        if self.samples and not self.grid:
            raise ValueError(f"samples = {self.samples} are drawn from a grid: give one")
        if self.grid:
            _ = self.variants
        if self.halving != tuple(sorted(set(self.halving))):
            raise ValueError(f"halving = {list(self.halving)}: every share must be larger than the one before")
        if self.halving and self.metric_for_best_variant == "win_rate":
            raise ValueError("halving compares held-out pairs, and metric_for_best_variant = win_rate reads answers")
        return self
