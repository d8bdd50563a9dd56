"""Settings of `prefpipe generate`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from prefpipe.config import shared
from prefpipe.config.base import Config
from prefpipe.config.rewards import check_gpu_memory


class GenerateConfig(Config):
    """Sample completions for prompts, with reference log-probs and rewards beside them."""

    model: shared.Model = shared.DEFAULT_MODEL
    adapter: shared.Adapter = "none"
    prompts: shared.Prompts = ""
    split: shared.Split = "train"
    limit: shared.Limit = 0
    engine: shared.Engine = "vllm"
    base_urls: shared.BaseUrls = ()
    api_key_env: shared.ApiKeyEnv = "VLLM_API_KEY"
    timeout_seconds: shared.TimeoutSeconds = 600.0
    reference: Literal["policy", "base", "none"] = "policy"
    """Whose log-probs to cache as those of the reference: the policy that samples (captured while sampling, at no
    cost), the base model (one more pass with the adapter off), or none."""
    reward_settings: shared.RewardSettings = shared.NO_TABLES
    rewards: shared.Rewards = ()
    num_samples: Annotated[int, Field(ge=1)] = 8
    """Completions for every prompt."""
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
    check: Annotated[int, Field(ge=0)] = 32
    """Rows that another engine (vllm for transformers, transformers for the others) scores again, for parity.json."""
    shard_rows: shared.ShardRows = 0
    max_num_seqs: shared.MaxNumSeqs = 64
    workers: shared.Workers = "auto"
    cluster: shared.Cluster = ""
    tensor_parallel_size: shared.TensorParallelSize = 1
    gpu_memory_utilization: shared.GpuMemoryUtilization = 0.85
    kv_cache_mib: shared.KvCacheMib = 512

    @model_validator(mode="after")
    def _fits_on_a_gpu(self) -> Self:
        vllm_scores_again = self.engine == "transformers" and self.reference != "none" and self.check > 0
        share = self.gpu_memory_utilization if self.engine == "vllm" or vllm_scores_again else None
        check_gpu_memory(share, self.rewards, self.reward_settings)
        return self
