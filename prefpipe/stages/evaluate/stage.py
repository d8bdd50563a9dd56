"""Greedy and sampled answers of a policy to held-out prompts, rated, with intervals, beside those of other policies.

    prefpipe evaluate stages/evaluate/short-sentence.toml --adapter runs/t/adapter --out DIR

1. Read prompts, policy, chat template, rewards, baselines, guards and other policies, and identify each by its content;
   refuse prompts that the policy was trained on.
2. Open DIR; a run that is complete, with everything that is asked for, stays as it is.
3. Sample every prompt that has no committed shard yet, rate the answers; commit each shard when it is whole. The same
   for guards, and log-probs of the text and of the answers by the policy's own model.
4. With that engine gone: log-probs by other policies, further rewards, the judge.
5. Sum up over all shards: numbers with intervals, comparisons, guards, divergences.
6. Write the numbers as Parquet, and the manifest.

What is asked for beside the answers stands in folders that are named by content: the same command with more flags
computes what is missing, and samples nothing twice.
"""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from prefpipe import log, rewards
from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.shared import REWARD_CHOICES
from prefpipe.errors import UsageError
from prefpipe.inference.filling import Start, engines_on_demand
from prefpipe.inference.task import Task, gather_ledger, longest_sequence, open_task, read_task
from prefpipe.rewards.base import RewardFunction
from prefpipe.rewards.rating import load_rewards
from prefpipe.runs import fsio, manifests
from prefpipe.runs.settled import settled
from prefpipe.runs.store import Manifest, Run
from prefpipe.schemas import Measure, to_table
from prefpipe.stages.evaluate import (
    answers,
    baselines,
    benchmarks,
    comparisons,
    guards,
    kl,
    leaks,
    measures,
    perplexity,
    ratings,
    report,
    verdicts,
)
from prefpipe.stages.evaluate.answers import Answers
from prefpipe.stages.evaluate.baselines import Baseline
from prefpipe.stages.evaluate.guards import Guarded
from prefpipe.stages.evaluate.kl import Target
from prefpipe.stages.evaluate.perplexity import Text
from prefpipe.stages.evaluate.verdicts import Court

_MEASURES = "measures"


@dataclass(frozen=True)
class Beside:
    """What is asked for beside the answers and the reward that decides; `identity` is what each depends on, by name."""

    baselines: list[Baseline]
    court: Court | None
    guards: list[Guarded]
    targets: list[Target]
    text: Text | None
    rewards: dict[str, RewardFunction]
    identity: dict[str, str]

    @property
    def places(self) -> dict[str, str]:
        """Where each baseline lies."""
        return {baseline.id: baseline.directory for baseline in self.baselines}


def run(config: EvaluateConfig, out: Path, *, force: bool) -> Manifest:
    """Sample every prompt that has no committed shard yet, rate the answers, compute what is asked for, sum up."""
    if not config.reward:
        raise UsageError("no reward given: nothing says which answers pass", f"pass --reward NAME: {REWARD_CHOICES}")
    config = settled(config, out)
    read = read_task(config, config.reward[:1])
    beside = _read_beside(config, read, out)
    guarded = [(guard.prompts, guard.task.prompts) for guard in beside.guards]
    leaks.check(config.trained_on, [(config.prompts, read.prompts), *guarded])
    with open_task(out, "evaluate", config, read, force=force) as (output, task):
        manifest = output.manifest(lambda m: m["identity"].get("beside", {}) == beside.identity)
        if manifest is not None:
            return manifest
        with engines_on_demand(task, config) as start:
            answered, guarded = _sample(config, output, task, beside, start)
        kl.fill_others(config, answered, beside.targets)
        datasets = {
            name: ratings.fill(config, answered, name, function, beside.identity[f"reward {name}"])
            for name, function in beside.rewards.items()
        }
        if beside.court is not None:
            verdicts.fill(config, answered, beside.court, beside.baselines)
        totals = _totals(config, answered, guarded, datasets, beside)
        fsio.remove(out / "manifest.json")  # one that lacks something, or has more than is asked for
        table = to_table(Measure, list(report.rows(totals, task.policy.id)))
        output.write_part(_MEASURES, Measure, 0, table)
        identity = {"policy": task.policy.id, **({"beside": beside.identity} if beside.identity else {})}
        balances = chain.from_iterable(part.balances() for part in (answered, *guarded))
        return output.finish(totals, identity, balances, beside.places)


def summary(manifest: Manifest, out: Path) -> list[str]:
    """What the command prints when it is done."""
    return report.summary(manifests.placed(manifest), out)


def _read_beside(config: EvaluateConfig, task: Task, out: Path) -> Beside:
    """Read and identify everything that is asked for beside the answers. Raises what each of it raises."""
    deciding, *further = config.reward
    functions, _ = load_rewards(further, config.reward_settings)
    identities = {name: rewards.identity(name, config.reward_settings) for name in (deciding, *further)}
    baselines.check_apart(config.baseline, out)
    compared = [baselines.read(directory, deciding, identities[deciding]) for directory in config.baseline]
    for baseline in compared:
        comparisons.check_shared(baseline, task.prompts)
    court = verdicts.read(config)
    guarded = guards.read(config, task)
    targets = [kl.read(name, config, task) for name in config.kl_to]
    if targets:
        kl.notice_other_distribution(config)
    text = perplexity.read(config.perplexity_text, longest_sequence(task, config)) if config.perplexity_text else None
    if court is not None and not compared:
        log.warn(f"judge {court.name} has nothing to compare with: give a baseline")
    identity = {
        **{f"reward {name}": identities[name] for name in further},
        **{f"baseline {i}": b.id for i, b in enumerate(compared)},
        **(court.identities if court else {}),
        **{f"guard {i} {g.prompts}:{g.reward}": g.identity(config) for i, g in enumerate(guarded)},
        **{f"kl {i} {target.name}": target.id for i, target in enumerate(targets)},
        **({f"perplexity {text.file}": text.key} if text else {}),
        **benchmarks.identity(out),
    }
    return Beside(compared, court, guarded, targets, text, functions, identity)


def _sample(
    config: EvaluateConfig, output: Run, task: Task, beside: Beside, start: Start
) -> tuple[Answers, list[Answers]]:
    """What the engine of the policy does: the answers, those to the guards, and log-probs."""
    answered = answers.sample(config, output, task, start, num_samples=config.num_samples)
    guarded = guards.fill(config, output, beside.guards, start)
    if beside.text is not None:
        perplexity.fill(output, beside.text, task, start)
    kl.fill(config, answered, beside.targets, start)
    before = [row for part in guarded for row in (*part.task.repeated, *part.dropped())]
    gather_ledger(output, len(task.prompts), [*task.repeated, *before])
    return answered, guarded


def _totals(
    config: EvaluateConfig, answered: Answers, guarded: list[Answers], datasets: dict[str, str], beside: Beside
) -> dict[str, Any]:
    """Every number of the run, each with its interval."""
    groups = [group for rows in answered.shards() for group in measures.measure(rows)]
    totals: dict[str, Any] = {"round": config.round, **measures.summarize(groups, config.pass_reward)}
    totals["rewards"] = ratings.totals(answered, datasets)
    for baseline in beside.baselines:
        comparison = comparisons.totals(answered, baseline, config.pass_reward, answered.run.out)
        if beside.court is not None:
            comparison |= verdicts.totals(answered, beside.court, baseline)
        totals.setdefault("comparisons", []).append(comparison)
    for guard, part in zip(beside.guards, guarded, strict=True):
        totals.setdefault("guards", []).append(guards.totals(guard, part, beside.baselines))
    if beside.text is not None:
        totals["perplexity"] = perplexity.totals(answered.run, beside.text, beside.baselines)
    if beside.targets:
        totals["kl"] = [kl.totals(answered, target) for target in beside.targets]
    if found := benchmarks.totals(answered.run.out):
        totals["benchmarks"] = found
    for notice in report.notices(totals, config.pass_reward, beside.places):
        log.warn(notice)
    return totals
