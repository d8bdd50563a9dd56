"""Settings of `prefpipe score`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from prefpipe.config import shared
from prefpipe.config.base import ADDED, PATH, REMOTE, RUNTIME, Heading
from prefpipe.config.engine import EngineConfig
from prefpipe.config.rewards import check_gpu_memory


class ScoreConfig(EngineConfig):
    """Add reference log-probs or rewards to completions, pairs or labels that exist already, ours or foreign."""

    inputs: Annotated[tuple[str, ...], PATH, REMOTE, Heading("Model and rows")] = ()
    """Run directories (generate, build-pairs, score), files or folders of preference, unpaired or rated rows (JSON,
    Parquet, Arrow; JSON may be compressed), datasets of the hub (hf:OWNER/NAME) or files of one (hf://datasets/...)."""
    share: Annotated[float, ADDED, Field(gt=0, le=1)] = 1.0
    """Use only this share of the pairs, labels or groups of runs, drawn by their ids and the seed."""
    column: shared.Column = ()

    reference: Annotated[Literal["policy", "none"], Heading("Reference log-probs")] = "policy"
    """Whose log-probs to add: those of the model with its adapter, or none (rewards only; no model is loaded)."""
    check: Annotated[int, Field(ge=0)] = 32
    """Rows that another scorer (vllm for transformers, transformers for the others) scores again, for parity.json."""

    rewards: Annotated[shared.Rewards, Heading("Rewards")] = ()

    max_length: Annotated[int, Field(ge=2), Heading("Text to tokens")] = 2048
    """Longest prompt and completion together, in tokens; never more than the model's context."""
    max_prompt_length: Annotated[int, Field(ge=1)] = 1024
    """Longest prompt of a foreign row, in tokens; a row with a longer one is dropped."""
    overlong: Literal["drop", "keep_start"] = "drop"
    """A foreign row over max_length: drop it, or keep the start of its completion."""

    part: Annotated[str, ADDED, Field(pattern=shared.PART), Heading("Machines and memory")] = "1/1"
    """I/N: only every N-th shard of the inputs, from the I-th. One process per GPU takes its own part and --out;
    `prefpipe gather` joins them."""
    shard_rows: Annotated[int, RUNTIME, Field(ge=1)] = 256
    """Rows of a foreign file in one shard: the unit of commit and of resume."""
    max_tokens_per_batch: Annotated[int, RUNTIME, Field(ge=16)] = 2048
    """Token budget of one scoring pass: bounds the memory of its log-probs."""

    @model_validator(mode="after")
    def _fits_on_a_gpu(self) -> Self:
        checked_with_vllm = self.engine == "transformers" and self.check > 0
        uses_vllm = self.reference == "policy" and (self.engine == "vllm" or checked_with_vllm)
        check_gpu_memory(self.gpu_memory_utilization if uses_vllm else None, self.rewards, self.reward_settings)
        return self

    @model_validator(mode="after")
    def _adds_something(self) -> Self:
        """Foreign files are worth reading without scores: their rows become ours."""
        runs_only = bool(self.inputs) and all((Path(source) / "manifest.json").exists() for source in self.inputs)
        if runs_only and self.reference == "none" and not self.rewards and self.share == 1:
            raise ValueError("nothing to do: no reference and no rewards; pass --rewards NAME, or --reference policy")
        return self
