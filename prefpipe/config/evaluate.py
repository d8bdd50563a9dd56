"""Settings of `prefpipe evaluate`."""

import re
from collections.abc import Collection
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from prefpipe.config import shared
from prefpipe.config.base import ADDED, BESIDE, FIRST, PATH, Heading
from prefpipe.config.engine import SamplingConfig
from prefpipe.config.judge import Judge
from prefpipe.config.rewards import check_gpu_memory


class Guard(NamedTuple):
    """A prompt set that a policy must not get worse on, and the reward that decides there."""

    prompts: str
    reward: str


def parse_guard(text: str, tables: Collection[str]) -> Guard:
    """The two parts of a guard FILE:REWARD. The reward is a kind, a table of `tables`, or `module:function`.

    Raises ValueError for any other text.
    """
    *before, last = text.split(":")
    name = last
    if last not in shared.REWARD_NAMES and last not in tables and len(before) > 1 and "/" not in before[-1]:
        name = f"{before.pop()}:{last}"
    prompts = ":".join(before)
    if not prompts or not last:
        raise ValueError("a guard is written FILE:REWARD, such as other.jsonl:refusal")
    return Guard(prompts, name)


def _check_guard(text: str, info: ValidationInfo) -> str:
    shared.check_reward(parse_guard(text, info.data.get("reward_settings") or {}).reward, info)
    return text


def _as_list(value: Any) -> Any:
    """A list of rewards, also from the single name that older recipes and runs have."""
    if not isinstance(value, str):
        return value
    return (value,) if value else ()


def _no_sum(name: str) -> str:
    if re.search(r"[*+]|\s-|-\s", name):
        raise ValueError(
            "an answer passes by one reward: give each part its --reward, of which the first decides, or write the sum "
            "as a function of your own ('module:function')"
        )
    return name


class EvaluateConfig(SamplingConfig):
    """Rate a policy on held-out prompts, with intervals, and compare it with earlier evaluations."""

    split: shared.Split = "heldout"
    round: Annotated[int, Field(ge=0), Heading("Model and rows")] = 0
    """Number of the round that trained the policy; 0 is the policy before training."""

    reward: Annotated[
        tuple[Annotated[str, AfterValidator(_no_sum), AfterValidator(shared.check_reward)], ...],
        FIRST,
        Heading("Rewards"),
        BeforeValidator(_as_list, json_schema_input_type=str | tuple[str, ...]),
    ] = ()
    """Rewards of every answer, named as those of generate. The first decides whether an answer passes; there is no
    default. The others are reported beside it."""
    pass_reward: float = 1.0
    """An answer passes when its deciding reward is at least this."""

    baseline: Annotated[tuple[str, ...], ADDED, BESIDE, PATH, Heading("Comparisons and guards")] = ()
    """Run directories of evaluate to compare with, on the prompts that both have: wins, ties and losses, a p value, the
    difference with its interval, the win rate at equal length."""
    judge: Annotated[str, ADDED, BESIDE] = ""
    """Name of a table in reward_settings with kind = "judge" and mode = "pairwise": it compares the answers with those
    of every baseline, in both orders."""
    judge_on: Annotated[Literal["greedy", "sampled", "all"], ADDED, BESIDE] = "greedy"
    """Answers that the judge compares: the greedy ones, the sampled ones (sample 1 with sample 1, ...), or all."""
    kl_to: Annotated[tuple[str, ...], ADDED, BESIDE] = ()
    """Policies whose log-probs of the sampled answers give the KL divergence to them: base (the model with the adapter
    off), a directory of an adapter on the same model, or another model."""
    guard: Annotated[tuple[Annotated[str, AfterValidator(_check_guard)], ...], ADDED, BESIDE] = ()
    """FILE:REWARD: other prompts with a reward of their own, answered greedily. A pass rate below that of a baseline by
    more than its interval is a failure."""
    guard_pass_reward: Annotated[tuple[float, ...], ADDED, BESIDE] = ()
    """An answer to a guard passes when its reward is at least this: one value for all guards, or one for each; without
    any, pass_reward."""
    guard_split: Annotated[str, ADDED, BESIDE] = "all"
    """Value of the `split` column of the guards whose prompts to use; 'all' for every prompt."""
    perplexity_text: Annotated[str, ADDED, BESIDE, PATH] = ""
    """Text file (UTF-8) whose mean negative log-prob per token is reported, and guarded as a pass rate is."""
    trained_on: Annotated[tuple[str, ...], ADDED, BESIDE, PATH] = ()
    """Runs (generate, score, build-pairs) that the policy was trained on. A prompt of theirs among the prompts or
    guards is an error."""

    num_samples: Annotated[int, Field(ge=1), Heading("Sampling")] = 2
    """Sampled answers to every prompt, beside the greedy one."""

    @property
    def guards(self) -> list[Guard]:
        """The guards, each as its prompts and its reward."""
        return [parse_guard(text, self.reward_settings) for text in self.guard]

    @model_validator(mode="after")
    def _guards_have_a_threshold_each(self) -> Self:
        if len(self.guard_pass_reward) not in (0, 1, len(self.guard)):
            raise ValueError(
                f"guard_pass_reward has {len(self.guard_pass_reward)} values for {len(self.guard)} guards: give one, "
                "or one for each"
            )
        return self

    @model_validator(mode="after")
    def _fits_on_a_gpu(self) -> Self:
        share = self.gpu_memory_utilization if self.engine == "vllm" else None
        guards = [guard.reward for guard in self.guards]
        check_gpu_memory(share, (*self.reward[:1], *guards), self.reward_settings)
        check_gpu_memory(None, (*self.reward, *guards, self.judge), self.reward_settings)
        return self

    @model_validator(mode="after")
    def _has_a_judge_of_pairs(self) -> Self:
        table = self.reward_settings.get(self.judge)
        if self.judge and not (isinstance(table, Judge) and table.mode == "pairwise"):
            raise ValueError(
                f'judge = "{self.judge}" is no judge of pairs: write a table [reward_settings.{self.judge}] with '
                'kind = "judge" and mode = "pairwise"'
            )
        return self
