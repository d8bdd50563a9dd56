"""`prefpipe sweep RECIPE --grid beta=0.03,0.1 --out DIR`: variants of a run of `train`, on one cached reference.

1. Make the variants of the grid, and refuse what cannot be compared.
2. Read the rows once, and check them against the settings of every variant. No model is loaded so far.
3. Hold DIR. A complete sweep stays as it is, a wider grid goes on.
4. Train: one base model, a new adapter for each variant; or side by side, a process for each GPU. With halving, the
   better half goes on after every share of the steps.
5. Evaluate the variants and the initial policy, where a recipe of `evaluate` is named.
6. Compare, write the table, the plot and the recipe of the best variant, and the manifest.

    DIR/variants/beta-0.03/     a run of `train`, as that command makes it by itself
    DIR/measures/               numbers with intervals (Parquet); sweep.json has them with the settings
    DIR/sweep.html, best.toml   the plot, and the best recipe; DIR/best is a link to its adapter or model
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefpipe import log
from prefpipe.config.base import dump
from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.grid import Variant
from prefpipe.config.sweep import SweepConfig
from prefpipe.errors import DataError, UsageError
from prefpipe.runs import fsio, links, saved_config, store
from prefpipe.runs.settled import settled
from prefpipe.runs.store import Manifest, Run
from prefpipe.schemas import Measure, to_table
from prefpipe.stages.iterate.runners import Runner
from prefpipe.stages.sweep import evaluations, results, rungs, table, training, workers
from prefpipe.stages.sweep.results import Result
from prefpipe.stages.sweep.training import FOLDER, WorkDone
from prefpipe.stages.train import inputs, loop, mixing, row_files
from prefpipe.stages.train.inputs import TrainingData
from prefpipe.stages.train.tally import key_of

_PLAN = ("grid", "samples", "halving", "metric_for_best_variant", "evaluate")


def run(config: SweepConfig, out: Path, *, force: bool, runner: Runner | None = None) -> Manifest:
    """Train and compare every variant that is not complete. `runner` runs an evaluation, by default in a process."""
    config = settled(config, out)
    variants = config.resolved_variants  # 1
    evaluated = evaluations.read(config)
    _check(config, evaluated)
    data = _rows(config, variants)  # 2
    plan = {name: dump(config)[name] for name in _PLAN}
    with store.open_run(out, "sweep", config, data.inputs, force=force) as run_dir:  # 3
        manifest = run_dir.manifest(lambda manifest: _holds(out, manifest, plan))
        if manifest is None:
            _save_plan(config, out)
            going_on, done = _train(config, variants, out, data)  # 4
            _log_work(run_dir, done, [variant.name for variant in variants])
            complete = [v for v in going_on if (out / FOLDER / v.name / "manifest.json").exists()]
            if evaluated is not None:
                evaluations.run(config, evaluated, complete, out, runner)  # 5
            found = _results(variants, out, data, done, evaluated=evaluated is not None)
            manifest = _finish(config, run_dir, found, plan)  # 6
    if data.stored:
        row_files.remove(data.stored)
    return manifest


def summary(manifest: Manifest, out: Path) -> list[str]:
    """The lines that the command prints when it is done."""
    totals = manifest["totals"]
    best = totals["best"]
    return [
        "",
        *table.lines(totals["variants"], best["name"]),
        "",
        totals["verdict"],
        f"recipe       {out}/best.toml",
        f"policy       {out}/best",
        *([f"plot         {out}/sweep.html"] if (out / "sweep.html").exists() else []),
        f"table        {out}/sweep.json, {out}/measures/*.parquet",
        f"runs         prefpipe compare {out}/{FOLDER}/A {out}/{FOLDER}/B",
    ]


def _check(config: SweepConfig, evaluated: EvaluateConfig | None) -> None:
    """Raise UsageError where no setting varies, or where nothing gives the metric for the best variant."""
    metric, kind = config.metric_for_best_variant, config.objective.kind
    if not config.grid:
        raise UsageError("no grid given: nothing varies", "pass --grid beta=0.03,0.1,0.3 (several of them combine)")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("a sweep has one process for each variant, not ranks", "start it without torchrun")
    if metric == "win_rate" and evaluated is None:
        raise UsageError("metric_for_best_variant = win_rate comes from evaluate", "name its recipe: --evaluate RECIPE")
    if metric != "win_rate" and not (config.eval_split or config.eval_pairs or config.eval_groups):
        raise UsageError(
            f"metric_for_best_variant = {metric} needs held-out rows",
            f"give --eval-split 0.1 or --eval-{'pairs' if kind == 'labels' else kind}, or --evaluate RECIPE and "
            "--metric-for-best-variant win_rate",
        )
    if metric != "win_rate" and config.variants[0].config.objective.kind == "labels":
        raise UsageError(f"labels have no {metric}", "use --evaluate RECIPE and --metric-for-best-variant win_rate")


def _rows(config: SweepConfig, variants: Sequence[Variant]) -> TrainingData:
    """The rows of all variants, read once. Raises as `train` does for a variant's settings and these rows."""
    data = inputs.prepare(workers.variant_for_rows(variants).config)
    if not data.rows:
        raise DataError("no row can be trained on", "`prefpipe train` with this recipe says why, row by row")
    for variant in variants:
        inputs.for_settings(data, variant.config)
        if config.halving:
            rungs.check(config.halving, _num_steps(variant, data), config.eval_steps)
    return data


def _train(
    config: SweepConfig, variants: Sequence[Variant], out: Path, data: TrainingData
) -> tuple[Sequence[Variant], WorkDone]:
    """Train all variants, from pause to pause. Returns the variants that were not stopped, and the work done."""
    done, going_on = WorkDone(), list(variants)
    for place in range(len(config.halving) + 1):
        last = {
            v.name: [*rungs.pauses(config.halving, _num_steps(v, data), config.eval_steps), 0][place] for v in going_on
        }
        number = workers.count(config.workers, len(going_on))
        step = training.train(going_on, out, data, last) if number <= 1 else workers.run(out, last, number)
        done.add(step)
        if place < len(config.halving):
            metric = config.metric_for_best_variant
            values = {v.name: results.at_step(v, out / FOLDER / v.name, last[v.name], metric) for v in going_on}
            kept = rungs.better_half(values)
            log.info(f"after {config.halving[place]:g} of the steps {len(kept)} of {len(going_on)} variants go on")
            going_on = [v for v in going_on if v.name in kept]
    return going_on, done


def _num_steps(variant: Variant, data: TrainingData) -> int:
    return loop.num_steps(mixing.epoch_size(data.rows, variant.config), variant.config)


def _log_work(run_dir: Run, done: WorkDone, names: Sequence[str]) -> None:
    """Log the work done, in words and in timing.jsonl, and which runs of an earlier grid are not compared."""
    log.info(
        f"{len(names)} variants: base model loaded {_times(done.loads)}, cache audited {_times(done.audits)}, "
        f"memory probed {_times(done.probes)}, reference passes: {done.reference_passes}"
    )
    counts = {name: value for name, value in asdict(done).items() if name != "failed"}
    run_dir.log_timing(event="variants", **counts)
    others = sorted({place.name for place in (run_dir.out / FOLDER).iterdir()} - set(names))
    if others:
        log.info(f"of an earlier grid stay in {run_dir.out / FOLDER}, and are not compared: {', '.join(others)}")


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _results(
    variants: Sequence[Variant], out: Path, data: TrainingData, done: WorkDone, *, evaluated: bool
) -> list[Result]:
    prompts = {key_of(row): " ".join(map(str, row.prompt_ids)) for row in data.eval_rows}
    found: list[Result] = []
    for variant in variants:
        if variant.name in done.failed:
            found.append(Result(variant, "failed", 0, why=done.failed[variant.name]))
            continue
        evaluation = evaluations.place(out, variant) if evaluated else None
        found.append(results.read(variant, out / FOLDER / variant.name, prompts, evaluation, evaluations.start(out)))
    return found


def _finish(config: SweepConfig, run_dir: Run, found: Sequence[Result], plan: Mapping[str, Any]) -> Manifest:
    """Write the table, the plot, the best recipe and the manifest."""
    out, metric = run_dir.out, config.metric_for_best_variant
    best = results.best(found, metric)
    ordered = table.ordered(found, metric)
    rows = [result.as_json() for result in ordered]
    run_dir.write_report("sweep.json", {"best": best.as_json(), "verdict": best.sentence, "variants": rows})
    run_dir.write_part("measures", Measure, 0, to_table(Measure, [row for r in ordered for row in r.rows()]))
    fsio.write_text(out / "best.toml", table.recipe(best, len(found)))
    trained = out / FOLDER / best.result.variant.name
    links.publish(out / "best", trained / ("model" if best.result.variant.config.tuning == "full" else "adapter"))
    table.write_page(out / "sweep.html", rows, best.as_json(), best.sentence)
    totals = {"variants": rows, "best": best.as_json(), "verdict": best.sentence, "plan": dict(plan)}
    return run_dir.finish(totals, _digests(out, found))


def _digests(out: Path, found: Sequence[Result]) -> dict[str, str]:
    """The digests of the runs of complete variants, by variant."""
    names = [result.variant.name for result in found if result.state == "complete"]
    return {name: store.read_manifest(out / FOLDER / name)["digest"] for name in names}


def _holds(out: Path, manifest: Manifest, plan: Mapping[str, Any]) -> bool:
    """Whether a manifest belongs to the sweep with these settings, and the runs of its variants are unchanged."""
    if manifest["totals"]["plan"] != plan or not (out / "best.toml").exists():
        return False
    places = {name: out / FOLDER / name for name in manifest["identity"]}
    return all(
        (places[name] / "manifest.json").exists() and store.read_manifest(places[name])["digest"] == digest
        for name, digest in manifest["identity"].items()
    )


def _save_plan(config: SweepConfig, out: Path) -> None:
    """Write the grid of this command into config.json, so that it can be used as a recipe of the same sweep."""
    path = out / "config.json"
    saved = saved_config.read(path, force=False)
    if saved is not None and any(saved["config"].get(name) != dump(config)[name] for name in _PLAN):
        saved_config.write(path, "sweep", dump(config), saved["identity"])
