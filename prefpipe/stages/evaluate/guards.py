"""Other prompts on which a policy must not get worse: guards/KEY has its greedy answers to them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefpipe import log, rewards, statistics
from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.inference.cutting import take_part
from prefpipe.inference.filling import Start
from prefpipe.inference.task import Task
from prefpipe.inputs import files
from prefpipe.inputs.prompts import read_prompts
from prefpipe.rewards.rating import load_rewards
from prefpipe.runs.store import Run
from prefpipe.stages.evaluate import answers, comparisons, measures
from prefpipe.stages.evaluate.answers import Answers, key
from prefpipe.stages.evaluate.baselines import Baseline


@dataclass(frozen=True)
class Guarded:
    """A guard: its file and reward as the user wrote them, what is sampled, what stands for its content, and the
    reward from which on an answer passes."""

    prompts: str
    reward: str
    task: Task
    key: str
    pass_reward: float

    @property
    def folder(self) -> str:
        """Where its datasets stand."""
        return f"guards/{self.key}/"

    def identity(self, config: EvaluateConfig) -> str:
        """What its numbers depend on, beside the answers to it."""
        own = "" if self.pass_reward == config.pass_reward else f" from {self.pass_reward!r} on"
        return self.key + own


def read(config: EvaluateConfig, of: Task) -> list[Guarded]:
    """The guards of a run, with their prompts. Raises what `read_prompts` and `load_rewards` raise."""
    found: list[Guarded] = []
    given = config.guard_pass_reward or (config.pass_reward,)
    thresholds = given * len(config.guard) if len(given) == 1 else given
    for (prompts_file, reward), pass_reward in zip(config.guards, thresholds, strict=True):
        functions = of.rewards if reward in of.rewards else load_rewards([reward], config.reward_settings)[0]
        state = files.state([prompts_file])
        prompts, repeated = read_prompts(prompts_file, config.guard_split, 0, files.renames(config.column))
        guarded = replace(
            of,
            prompts=take_part(prompts, config.part),
            of_all_parts=prompts,
            repeated=repeated,
            rewards={reward: functions[reward]},
            source=prompts_file,
            read_state=state,
        )
        identity = rewards.identity(reward, config.reward_settings)
        content = key(files.digest(prompts_file), config.guard_split, identity)
        found.append(Guarded(prompts_file, reward, guarded, content, pass_reward))
    return found


def fill(config: EvaluateConfig, run: Run, guards: Sequence[Guarded], start: Start) -> list[Answers]:
    """Answer and rate the prompts of every guard that are not there yet."""
    return [answers.sample(config, run, guard.task, start, num_samples=0, folder=guard.folder) for guard in guards]


def totals(guard: Guarded, of: Answers, baselines: Sequence[Baseline]) -> dict[str, Any]:
    """The pass rate on a guard, its mean reward, and the drop against every baseline that has the guard.

    A drop has failed when the interval of the difference (ours - theirs) lies below 0.
    """
    rows = [row for shard in of.shards() for row in shard]
    passed = [measures.passes(row.reward, guard.pass_reward) for row in rows]
    low, high = statistics.wilson(passed)
    by_prompt: dict[str, list[float | None]] = defaultdict(list)
    for row in rows:
        by_prompt[row.prompt_id].append(row.reward)
    drops: list[dict[str, Any]] = []
    for baseline in baselines:
        dataset = guard.folder + answers.DATASET
        met = comparisons.meet(rows, baseline.answers(dataset)) if baseline.has(dataset) else []
        if not met:
            log.warn(f"baseline {baseline.directory} has no guard {guard.prompts}:{guard.reward} to compare with")
            continue
        difference = statistics.paired(
            [measures.passes(m.ours, guard.pass_reward) - measures.passes(m.theirs, guard.pass_reward) for m in met]
        )
        drops.append(drop(baseline, difference, failed=difference.high < 0))
    return {
        "prompts": guard.prompts,
        "reward": guard.reward,
        "dataset": guard.folder + answers.DATASET,
        "answers": len(rows),
        "pass": sum(passed) / len(passed),
        "low": low,
        "high": high,
        **measures.mean_reward(by_prompt.values()).named("mean_reward"),
        "drops": drops,
    }


def drop(baseline: Baseline, difference: statistics.Estimate, *, failed: bool) -> dict[str, Any]:
    """A difference to a baseline as totals have it."""
    return {"baseline": baseline.id, **difference.alone("difference"), "failed": failed}
