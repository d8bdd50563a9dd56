"""`prefpipe iterate stages/iterate/demo.toml --out DIR`: rounds of generate -> build-pairs -> train -> evaluate.

1. Identify the model, the prompts and the rounds that are taken from another run. Held-out prompts are not trained on.
2. Plan a round: an evaluation before training (round 0), then the steps of each round, linked to those before it.
3. Run each step in a process. Its saved config replays it.
4. After every round: which one is the best, and whether a rule says stop.
5. Link the best policy, and write the manifest: the results of every evaluation.

    DIR/round-0/evaluate           the policy before training
    DIR/round-1/generate.json      the config of a step: `prefpipe generate THIS.json --out RUN` replays it
    DIR/round-1/generate/          its run directory
    DIR/best                       a link to the adapter or model of the best round

A step that is complete says so and does nothing; a killed one resumes where it was cut.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

from prefpipe import clock, log, machine
from prefpipe.config import base
from prefpipe.config.base import dump
from prefpipe.config.iterate import FIXED, IterateConfig
from prefpipe.config.reward_sum import parse
from prefpipe.config.shared import REWARD_CHOICES
from prefpipe.errors import DataError, PrefpipeError, UsageError
from prefpipe.ids import canonical_json
from prefpipe.inputs import files, hub
from prefpipe.models import policy
from prefpipe.runs import fsio, links, page, saved_config, store, tables
from prefpipe.runs.settled import settled
from prefpipe.runs.store import Manifest, Run
from prefpipe.schemas import Dropped, from_table
from prefpipe.stages.iterate import branch, leaks, stops
from prefpipe.stages.iterate import summary as summaries
from prefpipe.stages.iterate.best import Totals, best_place, value
from prefpipe.stages.iterate.plan import Known, Step, evaluation, leaves_engine, reference, steps, trained
from prefpipe.stages.iterate.runners import Engines, Processes, Runner
from prefpipe.stages.iterate.stops import Series, Stop

# Copies of the weights that fit into the free memory beside an engine that stays: of training in float32, with room.
_COPIES = 10


@dataclass
class _Rounds:
    """What the rounds so far have made: manifests by step, totals of evaluate, of build-pairs by round from 1."""

    out: Path
    metric: str
    manifests: dict[str, Manifest] = field(default_factory=dict[str, Manifest])

    def totals(self, command: str) -> list[dict[str, Any]]:
        """The totals of a command, round by round."""
        return [manifest["totals"] for name, manifest in self.manifests.items() if name.endswith(f"/{command}")]

    @property
    def series(self) -> Series:
        """What the rules go by."""
        return Series(self.totals("evaluate"), self.totals("build-pairs"), self.metric)

    @property
    def best(self) -> Totals:
        """The evaluation of the best round so far."""
        evaluations = self.totals("evaluate")
        return evaluations[best_place(evaluations, self.metric)]

    @property
    def evaluated(self) -> int:
        """The last round that was evaluated."""
        return int(self.totals("evaluate")[-1]["round"])

    def read(self, names: Iterable[str]) -> None:
        """Add steps that are complete, by their names."""
        self.manifests |= {name: store.read_manifest(self.out / name) for name in names}


def run(config: IterateConfig, out: Path, *, force: bool, runner: Runner | None = None) -> Manifest:
    """Run every step that is not complete. `runner` runs a step (by default in a process)."""
    if not config.train.learning_rate and not config.learning_rates:
        config = config.model_copy(update={"train": config.train.resolved})
        log.info(f"train.learning_rate = {config.train.learning_rate:g}: the default of tuning = {config.train.tuning}")
    if config.report:
        page.check_installed()
    config = settled(config, out)
    taken = branch.digests(config)
    inputs = _inputs(config) | branch.identity(taken)
    # A complete run is shown as it is, whatever its prompts were.
    num_prompts = leaks.check(config) if force or not (out / "manifest.json").exists() else None
    with store.open_run(out, "iterate", config, inputs, force=force) as run_dir:
        manifest = run_dir.manifest(lambda manifest: _holds(config, out, manifest))
        if manifest is not None:
            return manifest
        num_prompts = leaks.check(config) if num_prompts is None else num_prompts
        _save_rounds(config, out)
        branch.link(config, out)
        start = clock.monotonic()
        rounds = _Rounds(out, config.metric_for_best_round)
        rounds.read(taken)
        with Processes(config.launcher, _engines(config)) as processes:
            stop = _run_rounds(config, rounds, num_prompts, _timed(runner or processes, run_dir))
        run_dir.log_timing(event="rounds", seconds=round(clock.monotonic() - start, 1))
        manifest = _finish(config, run_dir, rounds, stop)
        if config.report:
            page.write(out)
        return manifest


def summary(manifest: Manifest, out: Path) -> list[str]:
    """What the command prints when it is done."""
    return summaries.lines(manifest, out)


def _timed(runner: Runner, run_dir: Run) -> Runner:
    """Runs steps and notes how long each took."""

    def run(command: str, saved: Path, out: Path) -> None:
        start = clock.monotonic()
        runner(command, saved, out)
        name = str(out.relative_to(run_dir.out))
        run_dir.log_timing(event="step", step=name, seconds=round(clock.monotonic() - start, 1))

    return run


def _engines(config: IterateConfig) -> Engines:
    """Which engines stay open: one through all rounds where that is asked for, or where no GPU is visible and several
    copies of the model fit into the free memory. A policy that is a model of its own is never taken by an engine."""
    after, lora = leaves_engine(config), config.train.tuning == "lora"
    throughout = config.keep_engine == "always"
    if config.keep_engine == "auto" and lora:
        weights = policy.weights_bytes(policy.resolve(config.model).directory)
        throughout = machine.on_cpu() and _COPIES * weights <= machine.available_memory()
    throughout = throughout and lora
    return Engines(after, throughout, throughout and machine.on_cpu(), config.train.lora_r if throughout else 0)


def _run_rounds(config: IterateConfig, rounds: _Rounds, num_prompts: int, runner: Runner) -> Stop | None:
    """Run the rounds one by one, until the last or until a rule says stop."""
    first = config.from_round + 1 if config.from_run else 0
    for number in range(first, config.rounds + 1):
        known = _known(config, rounds, number, num_prompts)
        stop = _run_round(config, rounds, number, known, runner)
        # A round that is there counts, whatever the rules say by now.
        later = range(number + 1, config.rounds + 1)
        if stop is None and known.evaluates and not any(_is_evaluated(rounds.out, n) for n in later):
            stop = stops.check(rounds.series, config.stop)
        elif stop is not None and rounds.evaluated < stop.round >= first:  # the last policy is a result
            last = _known(config, rounds, stop.round, num_prompts)
            _run_steps(config, rounds, [evaluation(config, rounds.out, stop.round, last)], runner)
        if stop is not None:
            log.warn(f"stopped after round {stop.round} by rule {stop.rule}: {'; '.join(stop.why)}")
            return stop
    return None


def _known(config: IterateConfig, rounds: _Rounds, number: int, num_prompts: int) -> Known:
    """What is known before a round. One that was the last before there were to be more stays evaluated."""
    evaluates = number % config.evaluate_every == 0 or number == config.rounds or _is_evaluated(rounds.out, number)
    if number == 0:
        return Known(num_prompts=num_prompts)
    return Known(rounds.best["round"], rounds.evaluated, num_prompts, evaluates)


def _is_evaluated(out: Path, number: int) -> bool:
    return (out / f"round-{number}" / "evaluate" / "manifest.json").exists()


def _run_round(config: IterateConfig, rounds: _Rounds, number: int, known: Known, runner: Runner) -> Stop | None:
    """Run the steps of a round. Returns why the rounds end before it, where no prompt gives anything to train on."""
    branch.check_optimizer(config, rounds.out, number)
    try:
        _run_steps(config, rounds, steps(config, rounds.out, number, known), runner)
    except PrefpipeError as error:
        built = rounds.out / f"round-{number}" / "build-pairs"
        ties = _ties(built) if error.exit_code == DataError.exit_code else {}
        if not ties or number == 1 or "mixed" not in config.stop.rules:
            raise
        return stops.without_pairs(number, ties)
    if config.report and known.evaluates and number < config.rounds:
        page.renew(rounds.out)
    return None


def _run_steps(config: IterateConfig, rounds: _Rounds, steps: Iterable[Step], runner: Runner) -> None:
    """Run steps of one round, and read them when all of them are there."""
    names: list[str] = []
    for step in steps:
        _run_step(step, config.rounds, rounds.out, runner)
        names.append(step.name)
    rounds.read(names)


def _ties(run_dir: Path) -> dict[str, int]:
    """Why the prompts of a run of build-pairs gave no row, by its ledger; empty where it did not end for outcomes that
    are alike."""
    ledger = run_dir / "dropped.parquet"
    if (run_dir / "manifest.json").exists() or not ledger.exists():
        return {}
    reasons = Counter(row.reason for row in from_table(Dropped, tables.read_table(ledger, Dropped)))
    return dict(reasons) if reasons["tie"] or reasons["one_class"] else {}


def _run_step(step: Step, last: int, out: Path, runner: Runner) -> None:
    log.info(f"round {step.round}/{last}: {step.name.rpartition('/')[2]}")
    saved = out / f"{step.name}.json"
    fsio.write_text(saved, canonical_json({"command": step.command, "config": dump(step.config)}) + "\n")
    runner(step.command, saved, out / step.name)


def _finish(config: IterateConfig, run_dir: Run, rounds: _Rounds, stop: Stop | None) -> Manifest:
    """Link the best policy and write the manifest."""
    best_of_all, out = rounds.best, run_dir.out
    number = best_of_all["round"]
    if number:
        best = trained(config, out, number)
        links.publish(out / "best", Path(best.model if best.adapter == "none" else best.adapter))
    else:
        links.withdraw(out / "best")
    totals = {
        "rounds": rounds.totals("evaluate"),
        "best": {
            "round": number,
            "metric": config.metric_for_best_round,
            "value": value(best_of_all, config.metric_for_best_round),
        },
        "stopped": asdict(stop) if stop else None,
    }
    return run_dir.finish(totals, {name: manifest["digest"] for name, manifest in rounds.manifests.items()})


def _holds(config: IterateConfig, out: Path, manifest: Manifest) -> bool:
    """Whether a manifest is that of a run with nothing left to do: its steps are there, and as many rounds as are asked
    for, or as many as the rules allow."""
    if not all(_is_unchanged(out / name, digest) for name, digest in manifest["identity"].items()):
        return False
    rounds = _Rounds(out, config.metric_for_best_round)
    rounds.read(manifest["identity"])
    return rounds.evaluated >= config.rounds or stops.check(rounds.series, config.stop) is not None


def _save_rounds(config: IterateConfig, out: Path) -> None:
    """Let config.json say how many rounds there are to be, so that it makes the same run as a recipe."""
    path = out / "config.json"
    saved = saved_config.read(path, force=False)
    if saved is not None and saved["config"].get("rounds") != config.rounds:
        saved_config.write(path, "iterate", dump(config), saved["identity"])


def _inputs(config: IterateConfig) -> dict[str, str]:
    """What identifies model and prompts. Raises UsageError without prompts, or rewards that the steps can find."""
    for table in ("generate", "evaluate"):
        if not getattr(config, table).prompts:
            raise UsageError(f"no prompts given for {table}", f"set prompts in the [{table}] table")
    parse(
        config.build_pairs.reward,
        config.generate.rewards,
        "the completions of [generate]",
        "set reward in the [build_pairs] table",
    )
    if not config.evaluate.reward:
        raise UsageError("no reward given for evaluate", f"set reward in the [evaluate] table: {REWARD_CHOICES}")
    inputs = {
        "policy": policy.resolve(config.model).id,
        "generate.prompts": files.digest(config.generate.prompts),
        "evaluate.prompts": files.digest(config.evaluate.prompts),
    }
    inputs |= _contents(config)
    if config.reference.startswith(FIXED):
        fixed = reference(config, Path(), 1, 0)
        inputs["reference"] = policy.resolve(fixed.model, fixed.adapter).id
    return inputs


def _contents(config: IterateConfig) -> dict[str, str]:
    """What stands for the content of every other file, run and dataset that the tables name, by the setting: the
    fingerprint has no path."""
    named: list[tuple[str, object]] = [
        (f"evaluate.guard {number}", guard.prompts) for number, guard in enumerate(config.evaluate.guards)
    ]
    for name, setting in base.fields(IterateConfig):
        value = reduce(getattr, name.split("."), config)
        if base.PATH in setting.metadata and "." in name and not name.endswith(".prompts") and value != setting.default:
            several = isinstance(value, tuple)
            named += [(f"{name} {number}", text) for number, text in enumerate(value)] if several else [(name, value)]
    return {
        name: files.digest(text)
        for name, text in named
        if isinstance(text, str) and (hub.is_hub(text) or Path(text).exists())
    }


def _is_unchanged(run_dir: Path, digest: str) -> bool:
    return (run_dir / "manifest.json").exists() and store.read_manifest(run_dir)["digest"] == digest
