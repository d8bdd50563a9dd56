"""Settings of `prefpipe generate`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from prefpipe.config import shared
from prefpipe.config.base import Heading
from prefpipe.config.engine import SamplingConfig
from prefpipe.config.rewards import check_gpu_memory


class GenerateConfig(SamplingConfig):
    """Sample completions for prompts, with reference log-probs and rewards beside them."""

    reference: Annotated[Literal["policy", "base", "none"], Heading("Reference log-probs")] = "policy"
    """Whose log-probs to cache as those of the reference: the policy that samples (captured while sampling, at no
    cost), the base model (one more pass with the adapter off), or none."""
    check: Annotated[int, Field(ge=0)] = 32
    """Rows that another engine (vllm for transformers, transformers for the others) scores again, for parity.json."""

    rewards: Annotated[shared.Rewards, Heading("Rewards")] = ()

    @model_validator(mode="after")
    def _fits_on_a_gpu(self) -> Self:
        vllm_scores_again = self.engine == "transformers" and self.reference != "none" and self.check > 0
        share = self.gpu_memory_utilization if self.engine == "vllm" or vllm_scores_again else None
        check_gpu_memory(share, self.rewards, self.reward_settings)
        return self
