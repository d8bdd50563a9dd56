"""When `prefpipe iterate` stops before its last round: the table [stop]."""

from typing import Annotated, Literal

from pydantic import Field

from prefpipe.config.base import RUNTIME, Config

StopRule = Literal["gain", "mixed", "kl", "length", "degenerate", "guard"]
Window = Annotated[int, Field(ge=1)]


class StopSettings(Config):
    """Thresholds and windows of the stop rules. They decide how many rounds run and never change a round, so that a
    finished run may go on with other values."""

    rules: Annotated[tuple[StopRule, ...], RUNTIME] = ("gain", "mixed", "kl", "length", "degenerate", "guard")
    """Rules that end the rounds, each after its so many rounds in a row; an empty list in a recipe for none. A rule
    without its measure (kl without kl_to, guard without guard or perplexity in [evaluate]) is silent."""
    gain_errors: Annotated[float, RUNTIME, Field(ge=0)] = 1.0
    """gain: a round gains less than so many standard errors of the difference over the best round before it."""
    gain_rounds: Annotated[Window, RUNTIME] = 2
    """Window of gain."""
    mixed_share: Annotated[float, RUNTIME, Field(ge=0, le=1)] = 0.2
    """mixed: a smaller share of the prompts has outcomes that the pair rule can tell apart (pairs and groups only)."""
    mixed_rounds: Annotated[Window, RUNTIME] = 1
    """Window of mixed."""
    kl_cap: Annotated[float, RUNTIME, Field(gt=0)] = 10.0
    """kl: the KL divergence from a model in evaluate.kl_to is above so many nats per answer."""
    kl_rounds: Annotated[Window, RUNTIME] = 1
    """Window of kl."""
    length_growth: Annotated[float, RUNTIME, Field(ge=1)] = 2.0
    """length: sampled answers have more than so many times the words of those before training ..."""
    length_loss: Annotated[float, RUNTIME, Field(ge=0, le=1)] = 0.25
    """... or less than this share of them."""
    length_rounds: Annotated[Window, RUNTIME] = 1
    """Window of length."""
    degenerate_rise: Annotated[float, RUNTIME, Field(ge=0, le=1)] = 0.2
    """degenerate: the share of degenerate answers, greedy or sampled, is above that before training by more than
    this."""
    degenerate_rounds: Annotated[Window, RUNTIME] = 1
    """Window of degenerate."""
    guard_rounds: Annotated[Window, RUNTIME] = 1
    """Window of guard: a guard of [evaluate], or its perplexity, has failed."""
