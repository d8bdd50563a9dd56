"""Settings of `prefpipe evaluate`."""

import re
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from prefpipe.config import shared
from prefpipe.config.base import STRICT
from prefpipe.config.rewards import check_gpu_memory


class EvaluateConfig(BaseModel):
    """Rate a policy on held-out prompts: one greedy and several sampled answers to each prompt."""

    model_config = STRICT

    model: shared.Model = shared.DEFAULT_MODEL
    adapter: shared.Adapter = "none"
    prompts: shared.Prompts = ""
    split: shared.Split = "heldout"
    limit: shared.Limit = 0
    engine: shared.Engine = "vllm"
    reward_settings: shared.RewardSettings = {}
    reward: shared.ChosenReward = ""
    """Reward that decides whether an answer passes: a name as in rewards of generate. It has no default."""
    pass_reward: float = 1.0
    """An answer passes when its reward is at least this."""
    num_samples: Annotated[int, Field(ge=1)] = 2
    """Sampled answers to every prompt, beside the greedy one."""
    temperature: shared.Temperature = 1.0
    top_p: shared.TopP = 1.0
    top_k: shared.TopK = 0
    min_p: shared.MinP = 0.0
    stop_token_ids: shared.StopTokenIds = ()
    stop: shared.Stop = ()
    max_tokens: shared.MaxTokens = 256
    max_prompt_tokens: shared.MaxPromptTokens = 1024
    special_tokens_in_prompts: shared.SpecialTokens = "drop"
    chat_template: shared.ChatTemplate = "model"
    template_date: shared.TemplateDate = "today"
    chat_template_kwargs: shared.TemplateKwargs = "{}"
    template_changes: shared.TemplateChanges = "drop"
    thinking_marks: shared.ThinkingMarks = "model"
    reward_on: shared.RewardOn = "answer"
    column: shared.Column = ()
    dtype: shared.Dtype = "auto"
    seed: shared.Seed = 0
    part: shared.Part = "1/1"
    round: Annotated[int, Field(ge=0)] = 0
    """Number of the round that trained the policy; 0 is the policy before training."""
    shard_rows: shared.ShardRows = 0
    max_num_seqs: shared.MaxNumSeqs = 64
    tensor_parallel_size: shared.TensorParallelSize = 1
    gpu_memory_utilization: shared.GpuMemoryUtilization = 0.85
    kv_cache_mib: shared.KvCacheMib = 512

    @field_validator("reward", mode="before")
    @classmethod
    def _one_reward(cls, value: Any) -> Any:
        if isinstance(value, str) and re.search(r"[*+]|\s-|-\s", value):
            raise ValueError(
                "an answer passes by one reward: evaluate in a run for each part, or write the sum as a function of "
                "your own ('module:function')"
            )
        return value

    @model_validator(mode="after")
    def _fits_on_a_gpu(self) -> Self:
        share = self.gpu_memory_utilization if self.engine == "vllm" else None
        check_gpu_memory(share, (self.reward,), self.reward_settings)
        return self
