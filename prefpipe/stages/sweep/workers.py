"""Variants trained side by side: processes with a GPU each. A process takes the variants that no other process holds.

    python -m prefpipe.stages.sweep.workers OUT UNTIL      such a process, for the sweep in OUT

UNTIL is a JSON object: names of the variants to train, each with the step at which it pauses. The last line of stdout
is the `WorkDone` of the process as JSON.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from prefpipe import log, machine, processes
from prefpipe.config import base
from prefpipe.config.grid import Variant
from prefpipe.config.sweep import SweepConfig
from prefpipe.errors import Interrupted, PrefpipeError, UsageError, of_process
from prefpipe.inference.pool_size import Size, environments
from prefpipe.runs.settled import settled
from prefpipe.stages.sweep import training
from prefpipe.stages.sweep.training import WorkDone
from prefpipe.stages.train.inputs import prepare

AUTO = "auto"


def count(asked: int | str, num_variants: int) -> int:
    """The number of processes that train at once. Raises UsageError for more than the visible GPUs, if there are
    any."""
    gpus = len(machine.visible_gpus())
    if asked == AUTO:
        return max(1, min(gpus, num_variants))
    if gpus and int(asked) > gpus:
        raise UsageError(f"workers = {asked}, and {gpus} GPUs are visible", "ask for fewer, or --workers auto")
    return min(int(asked), num_variants)


def run(out: Path, until: Mapping[str, int], number: int) -> WorkDone:
    """Train the variants in `until` in `number` processes, each to its end or to its step. Raises the error of the
    first process that failed, with its exit code."""
    gpus = machine.visible_gpus()
    with_gpu = environments(Size(number, gpus_each=1 if gpus else 0, gpus=gpus))
    command = processes.python("prefpipe.stages.sweep.workers", str(out), json.dumps(dict(until)))
    running = [
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            env={**processes.environment(), **environment},
            preexec_fn=processes.death_with_parent(),
        )
        for environment in with_gpu
    ]
    done = WorkDone()
    try:
        outputs = [process.communicate()[0] for process in running]
    except BaseException:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        raise
    for process, text in zip(running, outputs, strict=True):
        if code := process.returncode:
            raise of_process(f"a worker ended with exit code {code}", "run the same command again: it resumes", code)
        done.add(WorkDone(**json.loads(text.splitlines()[-1])))
    return done


def variant_for_rows(variants: Sequence[Variant]) -> Variant:
    """The variant with whose settings the rows are read: one that needs the reference, if there is any."""
    return next((v for v in variants if v.config.objective.needs("reference")), variants[0])


def work(out: Path, until: Mapping[str, int]) -> WorkDone:
    """Train variants of the sweep in `out` in this process; see `run`."""
    config = settled(base.load(SweepConfig, out / "config.json", {}), out)
    every = config.resolved_variants
    named = [variant for variant in every if variant.name in until]
    return training.train(named, out, prepare(variant_for_rows(every).config), until, skip_locked=True)


def main() -> int:
    """Train, and print the work done. Returns the exit code."""
    out, until = Path(sys.argv[1]), json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        done = work(out, until)
    except (PrefpipeError, Interrupted) as error:
        log.error(error.message, error.hint)
        return error.exit_code
    answers.write(json.dumps(asdict(done)) + "\n")
    answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
