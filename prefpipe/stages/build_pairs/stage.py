"""The stage: read key columns -> candidates -> pairs, labels or groups -> rows, ledger and data report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from prefpipe import log
from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.errors import DataError, PrefpipeError, UsageError
from prefpipe.models import vocabulary
from prefpipe.runs import fsio, store
from prefpipe.runs.store import Manifest, Run
from prefpipe.schemas import Dropped
from prefpipe.stages.build_pairs import accounting, candidates, data_report, groups, labels, pairs, prompt_filters
from prefpipe.stages.build_pairs.accounting import Level
from prefpipe.stages.build_pairs.data_report import Check
from prefpipe.stages.build_pairs.job import Built, Job, counts
from prefpipe.stages.build_pairs.label_rules import balance

_STRICT_EXIT = 3


@dataclass(frozen=True)
class _Settled:
    """What became of all completions: candidates by partition, or what the pair rule made of them; the ledger."""

    found: list[pairs.Found]
    candidates: list[pl.DataFrame]
    ledger: pl.DataFrame
    level: Level
    num_prompts: int


def run(config: BuildPairsConfig, out: Path, *, force: bool) -> Manifest:
    """Read the runs, select, filter, write; every completion is used, unused or in the ledger with its reason."""
    _check(config)
    with store.open_run(out, "build-pairs", config, _inputs(config), force=force) as output:
        manifest = output.manifest()
        if manifest is None:
            with fsio.temporary_dir(out / "partitions") as folder:
                manifest = _build(config, output, folder)
    warned = [c["id"] for c in manifest["totals"]["data_report"] if c["level"] == data_report.WARN]
    if config.strict and warned:
        for line in summary(manifest, out):
            log.info(line)
        failed = PrefpipeError(
            f"the data report warns: {', '.join(warned)}", f"see {out}/data_report.json, or leave out --strict"
        )
        failed.exit_code = _STRICT_EXIT
        raise failed
    return manifest


def summary(manifest: Manifest, out: Path) -> list[str]:
    """What the command prints when it is done: counts on every level, then the data report."""
    t = manifest["totals"]
    made = next(name for name in ("pairs", "labels", "groups") if name in t)
    lines = [f"{t[made]} {made} from {t['completions']} completions of {t['prompts']} prompts in {out}"]
    for name, level in t["levels"].items():
        reasons = ", ".join(f"{reason}: {count}" for reason, count in level["dropped"].items()) or "nothing"
        lines.append(f"  {name}: {level['in']} in, {level['out']} out; dropped: {reasons}")
    if made == "pairs":
        lines.append(
            f"  mean reward_gap {t['mean_reward_gap']:.3f}, chosen longer than rejected in {t['chosen_longer']:.0%}"
        )
    return [*lines, *data_report.table([Check(**c) for c in t["data_report"]])]


def _check(config: BuildPairsConfig) -> None:
    if not config.completions:
        raise UsageError("no completions given", "pass --completions DIR (a run of prefpipe generate or score)")
    if config.output == "groups" and config.format != "prefpipe":
        raise UsageError(
            "TRL has no trainer for ranked groups", "leave out --format, or choose --output pairs or labels"
        )
    if config.subset in ("small-implicit-gap", "large-dual-margin") and not config.policy_logps:
        raise UsageError(
            f"subset {config.subset} needs log-probs of a trained policy",
            "score the completions with it (prefpipe score) and pass that run as --policy-logps",
        )


def _inputs(config: BuildPairsConfig) -> dict[str, str]:
    named = ("completions", "reward_runs", "ref_logps", "policy_logps", "contamination")
    return {
        f"{name}.{number}": store.input_digest(Path(path))
        for name in named
        for number, path in enumerate(getattr(config, name))
    }


def _build(config: BuildPairsConfig, output: Run, folder: Path) -> Manifest:
    sources = candidates.open_sources(config)
    job = Job(config, sources, output, sources.num_partitions, folder)
    settled = _settle(job)
    if config.output == "pairs":
        built = pairs.build(job, settled.found)
    elif config.output == "labels":
        built = labels.build(job, settled.candidates)
    else:
        built = groups.build(job, settled.candidates)
    levels = {"completions": settled.level, **built.levels}
    ledger = pl.concat([settled.ledger, built.ledger]).sort("id", "reason", "detail")
    output.write_dropped(Dropped, ledger.to_arrow())
    accounting.check(levels, ledger.height)
    if not built.totals[config.output]:
        reasons = ", ".join(f"{r}: {n}" for r, n in counts(ledger).items())
        what = config.output.removesuffix("s")
        raise DataError(
            f"no {what} is left ({reasons})", f"see {output.out}/dropped.parquet for every row and its reason"
        )
    checks = [c.to_json() for c in _report(config, built)]
    output.write_report("data_report.json", {"checks": checks})
    totals: dict[str, Any] = {
        "completions": settled.level.came_in,
        "prompts": settled.num_prompts,
        **built.totals,
        "dropped": counts(ledger),
        "levels": {name: level.to_json() for name, level in levels.items()},
        "data_report": checks,
    }
    tokens = vocabulary.record(v for run in config.completions for v in vocabulary.recorded(Path(run)))
    return output.finish(totals, {"reward": config.reward, "policies": candidates.policies(sources), **tokens})


def _settle(job: Job) -> _Settled:
    """Candidates of every partition; for pairs the rule is applied at once, so that only pairs stay in memory."""
    config, sources = job.config, job.sources
    faulty = prompt_filters.faulty(candidates.scan(sources.prompts).select("prompt_id", "messages"), config)
    found: list[pairs.Found] = []
    kept: list[pl.DataFrame] = []
    ledgers: list[pl.DataFrame] = []
    num_in = num_rated = num_prompts = num_candidates = 0
    for part in candidates.read(sources, config, job.num_partitions, job.folder / "keys"):
        settled = candidates.settle(part.collect(), faulty, sources, config)
        num_in, num_rated = num_in + settled.num_in, num_rated + settled.num_rated
        num_prompts, num_candidates = num_prompts + settled.num_prompts, num_candidates + settled.candidates.height
        ledgers.append(settled.ledger)
        if config.output == "pairs":
            found.append(pairs.find(settled.candidates, config))
        else:
            kept.append(settled.candidates)
    candidates.check_foreign(sources, num_rated)
    ledger = pl.concat(ledgers)
    return _Settled(found, kept, ledger, Level(num_in, num_candidates, counts(ledger)), num_prompts)


def _report(config: BuildPairsConfig, built: Built) -> Sequence[Check]:
    level = built.levels.get("pairs", Level(0, 0, {}))
    share = None
    if config.output == "labels":
        share = balance(built.totals["desirable"], built.totals["undesirable"])
    data = data_report.Data(built.facts, built.sample, level.dropped, level.came_in, config.beta, share)
    return data_report.report(data)
