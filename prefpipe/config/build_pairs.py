"""Settings of `prefpipe build-pairs`."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from prefpipe.config import shared
from prefpipe.config.base import PATH, STRICT


class BuildPairsConfig(BaseModel):
    """Turn completions with rewards into pairs of a chosen and a rejected completion."""

    model_config = STRICT

    completions: Annotated[tuple[str, ...], PATH] = ()
    """Run directories of `prefpipe generate`."""
    reward: shared.StoredReward = "short_sentence"
    """Which reward ranks the completions."""
    rule: Literal["best-worst"] = "best-worst"
    """How completions of a prompt become pairs: best-worst pairs the k-th best with the k-th worst."""
    pairs_per_prompt: Annotated[int, Field(ge=1)] = 1
    """Most pairs taken from one prompt."""
    min_gap: Annotated[float, Field(ge=0)] = 0.0
    """A pair is kept when its reward_gap is above this; 0 drops ties only."""
    truncated_chosen: Literal["drop", "keep"] = "drop"
    """A pair whose chosen completion hit max_tokens teaches not to stop: drop it, or keep."""
