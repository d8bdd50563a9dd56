"""`prefpipe build-pairs stages/build-pairs/verifier.toml --completions runs/g --out DIR`

1. Open the runs with completions, rewards and log-probs; check digests and columns.
2. Drop prompts (duplicate, contaminated) and completions that are no candidates.
3. Make pairs, labels or groups of the candidates, drop what a filter refuses, write the rows.
4. Write the ledger: every completion, prompt and pair that was dropped, with its reason. Check that the rows add up.
5. Write the data report, then the manifest.
6. With --strict: fail when a check of the report warns.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from prefpipe import log
from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.errors import DataError, StrictError, UsageError
from prefpipe.models import vocabulary
from prefpipe.runs import fsio, store
from prefpipe.runs.store import Manifest
from prefpipe.schemas import Dropped
from prefpipe.stages.build_pairs import (
    accounting,
    candidates,
    data_report,
    groups,
    labels,
    pairs,
    prompt_filters,
    reward_values,
    user_rules,
)
from prefpipe.stages.build_pairs.accounting import BuildResult, Level, count_reasons
from prefpipe.stages.build_pairs.candidates import CandidatePartition, Sources, Workspace
from prefpipe.stages.build_pairs.data_report import Check
from prefpipe.stages.build_pairs.label_rules import balance
from prefpipe.stages.build_pairs.reward_values import Spread
from prefpipe.stages.build_pairs.tasks import Map, tasks

_INPUTS = ("completions", "reward_runs", "ref_logps", "policy_logps", "contamination")


@dataclass(frozen=True)
class _Selection:
    """The candidates by partition (for pairs: the pairs of the rule), the ledger and counts of the other completions,
    and for a sum of rewards the spread of its parts."""

    candidates: list[pl.DataFrame]
    rule_pairs: list[pairs.RulePairs]
    ledger: pl.DataFrame
    level: Level
    num_prompts: int
    spreads: list[Spread]


def run(config: BuildPairsConfig, out: Path, *, force: bool) -> Manifest:
    """Build the rows of `config.output` in `out`. Raises StrictError when `strict` is set and a check warns."""
    if not config.completions:
        raise UsageError("no completions given", "pass --completions DIR (a run of prefpipe generate or score)")
    for given in map(Path, config.completions):
        store.part_names(given, store.read_manifest(given), "completions")
    digests = _digests(config) | user_rules.inputs(config)
    reward_values.chosen_reward(config)  # an unknown reward is refused before OUT is touched
    with store.open_run(out, "build-pairs", config, digests, force=force) as run_dir:
        manifest = run_dir.manifest()
        if manifest is None:
            sources = candidates.open_sources(config)
            count = sources.num_partitions
            with fsio.temporary_dir(out / "partitions") as folder, _tasks(config, count, folder) as run_tasks:
                workspace = Workspace(config, sources, run_dir, count, folder, run_tasks)
                selection = _select(workspace)
                result = _write_rows(workspace, selection)
                levels = {"completions": selection.level, **result.levels}
                dropped = _write_ledger(workspace, selection, result, levels)
                checks = _write_report(workspace, result, selection.spreads)
                totals = {
                    "completions": selection.level.came_in,
                    "prompts": selection.num_prompts,
                    **result.totals,
                    "dropped": dropped,
                    "levels": {name: level.to_json() for name, level in levels.items()},
                    "data_report": checks,
                }
                manifest = run_dir.finish(totals, _identity(workspace))
    if config.strict:
        _refuse_warnings(manifest, out)
    return manifest


def _tasks(config: BuildPairsConfig, count: int, folder: Path) -> AbstractContextManager[Map]:
    if not config.cluster or count == 1:
        return tasks(min(config.workers, count))
    from prefpipe.inference import ray_tasks  # noqa: PLC0415  (ray only where it is asked for)

    return ray_tasks.tasks(config.cluster, folder, partial(user_rules.inputs, config))


def summary(manifest: Manifest, out: Path) -> list[str]:
    """What the command prints when it is done: counts on every level, then the data report."""
    t = manifest["totals"]
    output = next(name for name in ("pairs", "labels", "groups") if name in t)
    lines = [f"{t[output]} {output} from {t['completions']} completions of {t['prompts']} prompts in {out}"]
    for name, level in t["levels"].items():
        reasons = ", ".join(f"{reason}: {count}" for reason, count in level["dropped"].items()) or "nothing"
        lines.append(f"  {name}: {level['in']} in, {level['out']} out; dropped: {reasons}")
    if output == "pairs":
        lines.append(
            f"  mean reward_gap {t['mean_reward_gap']:.3f}, chosen longer than rejected in {t['chosen_longer']:.0%}"
        )
    return [*lines, *data_report.table(t["data_report"])]


def _select(workspace: Workspace) -> _Selection:
    """The candidates of every partition. For pairs the rule is applied at once, so that only pairs stay in memory."""
    config, sources = workspace.config, workspace.sources
    dropped_prompts = prompt_filters.dropped_prompts(candidates.prompts(sources), config)
    selected: list[pl.DataFrame] = []
    rule_pairs: list[pairs.RulePairs] = []
    ledgers: list[pl.DataFrame] = []
    terms: list[pl.DataFrame] = []
    num_rated, num_null = Counter[str](), Counter[str]()
    num_in = num_prompts = num_candidates = 0
    keys, num_rewards = candidates.read(
        sources, config, workspace.num_partitions, workspace.folder / "keys", workspace.run
    )
    for part, of_rule in workspace.run(partial(_select_partition, dropped_prompts, sources, config), keys):
        num_rated, num_null = num_rated + part.num_rated, num_null + part.num_null
        num_in, num_prompts = num_in + part.num_in, num_prompts + part.num_prompts
        num_candidates += part.num_candidates
        terms.append(part.terms)
        ledgers.append(part.ledger)
        rule_pairs += of_rule
        selected.append(part.candidates)
    reward_values.check_match(sources.rewards, sources.completions, num_rewards, num_rated)
    ledger = pl.concat(ledgers)
    level = Level(num_in, num_candidates, count_reasons(ledger))
    spreads = reward_values.spreads(pl.concat(terms), sources.rewards, num_null) if sources.rewards.is_sum else []
    for spread in spreads:
        if spread.missing:
            log.warn(f"{spread.missing} of {num_in} completions have no value of {spread.name}: they are left out")
    return _Selection(selected, rule_pairs, ledger, level, num_prompts, spreads)


def _select_partition(
    dropped_prompts: pl.DataFrame, sources: Sources, config: BuildPairsConfig, keys: pl.LazyFrame
) -> tuple[CandidatePartition, list[pairs.RulePairs]]:
    """A partition: its candidates, or for pairs the pairs of the rule in place of the candidates."""
    part = candidates.select(keys.collect(), dropped_prompts, sources, config)
    if config.output != "pairs":
        return part, []
    return replace(part, candidates=part.candidates.clear()), [pairs.apply_rule(part.candidates, config)]


def _write_rows(workspace: Workspace, selection: _Selection) -> BuildResult:
    if workspace.config.output == "pairs":
        return pairs.build(workspace, selection.rule_pairs)
    build = labels.build if workspace.config.output == "labels" else groups.build
    return build(workspace, selection.candidates)


def _write_ledger(
    workspace: Workspace, selection: _Selection, result: BuildResult, levels: Mapping[str, Level]
) -> dict[str, int]:
    """Dropped rows by reason. Raises DataError when no row of the output is left."""
    output, run_dir = workspace.config.output, workspace.run_dir
    ledger = pl.concat([selection.ledger, result.ledger]).sort("id", "reason", "detail")
    run_dir.write_dropped(Dropped, ledger.to_arrow())
    accounting.check(levels, ledger.height)
    dropped = count_reasons(ledger)
    if not result.totals[output]:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.items())
        raise DataError(
            f"no {output.removesuffix('s')} is left ({reasons})",
            f"see {run_dir.out}/dropped.parquet for every row and its reason",
        )
    return dropped


def _write_report(workspace: Workspace, result: BuildResult, spreads: Sequence[Spread]) -> list[Check]:
    config = workspace.config
    level = result.levels.get("pairs", Level(0, 0, {}))
    classes = None
    if config.output == "labels":
        classes = balance(result.totals["desirable"], result.totals["undesirable"])
    data = data_report.Data(result.facts, result.sample, level.dropped, level.came_in, config.beta, classes, spreads)
    checks = data_report.report(data)
    thinking = {"thinking": found} if (found := candidates.thinking(workspace.sources)) else {}
    workspace.run_dir.write_report("data_report.json", {"checks": checks, **thinking})
    return checks


def _identity(workspace: Workspace) -> dict[str, Any]:
    """Which reward, policies and vocabularies the rows come from."""
    config = workspace.config
    vocabularies = vocabulary.record(v for run in config.completions for v in vocabulary.recorded(Path(run)))
    return {"reward": config.reward, "policies": candidates.policies(workspace.sources), **vocabularies}


def _refuse_warnings(manifest: Manifest, out: Path) -> None:
    """Raise StrictError when a check of the data report warns, after the summary that the command then never prints."""
    warnings = [c["id"] for c in manifest["totals"]["data_report"] if c["level"] == data_report.WARN]
    if warnings:
        for line in summary(manifest, out):
            log.info(line)
        raise StrictError(
            f"the data report warns: {', '.join(warnings)}", f"see {out}/data_report.json, or leave out --strict"
        )


def _digests(config: BuildPairsConfig) -> dict[str, str]:
    """The content of every input, by setting and place: completions.0, ..."""
    return {
        f"{name}.{number}": store.input_digest(Path(path))
        for name in _INPUTS
        for number, path in enumerate(getattr(config, name))
    }
