"""A step is a process with its exit code; an evaluation and the sampling after it are one, with one engine."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from prefpipe import machine, processes
from prefpipe.config import base
from prefpipe.errors import PrefpipeError
from prefpipe.runs import store
from prefpipe.runs.store import Manifest
from prefpipe.stages.iterate import runners, stage
from prefpipe.stages.iterate.plan import Step
from prefpipe.stages.iterate.runners import Processes, launched
from tests.stages.iterate.cases import Make, config, in_process, planned, write_prompts


@pytest.fixture(scope="module")
def saved(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved configs of an evaluation and of the sampling after it."""
    folder = tmp_path_factory.mktemp("saved")
    steps = list(planned(config(tiny_model, write_prompts(folder / "p.jsonl")), folder))[:2]
    return {step.command: save(step, folder / f"{step.command}.json") for step in steps}


def save(step: Step, path: Path) -> Path:
    path.write_text(json.dumps({"command": step.command, "config": base.dump(step.config)}))
    return path


def starts(text: str) -> int:
    return text.count("starting engine fake")


@pytest.mark.slow
def test_two_steps_in_one_process_have_one_engine_and_the_digests_of_steps_alone(
    saved: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Processes() as run:
        for command, path in saved.items():
            run(command, path, tmp_path / "together" / command)
        assert run._sampling.process is not None  # one process for both
    together = capfd.readouterr()
    assert starts(together.err) == 1
    assert "engine fake is running already" in together.err
    assert together.out == ""  # stdout belongs to iterate
    assert "prompts rated in" in together.err
    for command, path in saved.items():
        in_process(command, path, tmp_path / "alone" / command)
    for command in saved:
        digests = {store.read_manifest(tmp_path / way / command)["digest"] for way in ("together", "alone")}
        assert len(digests) == 1


@pytest.mark.slow
def test_one_engine_goes_through_all_rounds_and_every_digest_is_that_of_steps_alone(
    make: Make, three: tuple[Path, Manifest], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two processes stay: one that samples and one that trains."""
    manifest = stage.run(make(rounds=3, keep_engine="always"), tmp_path / "out", force=False)
    assert starts(capfd.readouterr().err) == 1
    assert manifest["identity"] == three[1]["identity"]


def test_the_processes_that_wait_end_side_by_side() -> None:
    """Each takes seconds with vLLM or torch loaded: both hear of it before one is waited for."""
    calls: list[str] = []

    class Waiting:
        def __init__(self, name: str) -> None:
            self.dismiss, self.end = (partial(calls.append, f"{what} {name}") for what in ("dismiss", "end"))

    with Processes() as run:
        run._sampling, run._training = Waiting("sampling"), Waiting("training")  # type: ignore[assignment]
    assert calls == ["dismiss sampling", "dismiss training", "end sampling", "end training"]


@pytest.mark.slow
def test_a_step_that_fails_in_a_shared_process_is_named_with_its_exit_code(tmp_path: Path) -> None:
    """The process ends with the code of the step; the next step has a new one."""
    with Processes() as run:
        for command in ("evaluate", "generate"):
            wrong = tmp_path / f"{command}.json"
            absent = {
                "prompts": str(tmp_path / "absent.jsonl"),
                **({"reward": "length"} if command == "evaluate" else {}),
            }
            wrong.write_text(json.dumps({"command": command, "config": absent}))
            with pytest.raises(PrefpipeError, match=f"{command} failed with exit code 66") as caught:
                run(command, wrong, tmp_path / "out")
            assert caught.value.exit_code == 66
            assert f"prefpipe {command} {wrong} --out {tmp_path / 'out'}" in caught.value.hint


def test_a_killed_process_gives_the_shells_exit_code(tmp_path: Path) -> None:
    with Processes("sh -c 'kill -9 $$'") as run, pytest.raises(PrefpipeError) as caught:
        run("train", tmp_path / "train.json", tmp_path / "t")
    assert caught.value.exit_code == 128 + 9


_RUN = """
import sys
from pathlib import Path
from prefpipe import processes
from prefpipe.stages.iterate.runners import Processes
processes.python = lambda *words: ["sh", "-c", "echo runs >&2; exec sleep 60"]
with Processes("sh -c 'echo runs >&2; exec sleep 60'") as run:
    run(sys.argv[1], Path("saved.json"), Path("out"))
"""


@pytest.mark.parametrize("command", ["evaluate", "build-pairs", "train"])
def test_a_step_ends_when_iterate_alone_is_killed(command: str) -> None:
    """The steps that share a process, those that have one each, and a launcher. The step alone holds stderr by then."""
    words = [sys.executable, "-c", _RUN, command]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=processes.environment()) as iterate:
        assert iterate.stderr is not None
        assert iterate.stderr.readline() == "runs\n"
        iterate.kill()
        assert iterate.stderr.read() == ""


def test_a_process_that_ends_is_seen_although_another_holds_its_stdout(tmp_path: Path) -> None:
    """As a worker of vLLM may, whose engine was killed."""
    words = ["sh", "-c", "sleep 60 & echo $! >&2; exit 3"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        holder = int(process.stderr.readline())
        try:
            assert runners._answer(process) == ""
            assert process.returncode == 3
        finally:
            os.kill(holder, signal.SIGKILL)


def test_a_launcher_stands_in_front_of_train_and_of_nothing_else(saved: dict[str, Path], tmp_path: Path) -> None:
    """A launcher that writes down what it is asked to start."""
    script = tmp_path / "launch"
    script.write_text(f'#!/bin/sh\necho "$PYTHONSAFEPATH" "$@" > {tmp_path}/asked\n')
    script.chmod(0o755)
    with Processes(f"{script} -n 'a b'") as run:
        run("train", tmp_path / "train.json", tmp_path / "t")
    asked = (tmp_path / "asked").read_text().strip()
    arguments = f"train {tmp_path}/train.json --out {tmp_path}/t"
    assert asked == f"1 -n a b {sys.executable} -P -m prefpipe {arguments}"


@pytest.mark.slow
def test_torchrun_trains_a_step_on_two_ranks_as_one_process_does(three: tuple[Path, Manifest], tmp_path: Path) -> None:
    """The global batch is the same: the loss differs by rounding."""
    alone = three[0] / "round-1"
    with Processes("torchrun --standalone --nproc_per_node 2") as run:
        run("train", alone / "train.json", tmp_path / "t")
    totals = [store.read_manifest(out)["totals"] for out in (alone / "train", tmp_path / "t")]
    assert totals[0]["steps"] == totals[1]["steps"]
    assert totals[0]["last_step"]["loss"] == pytest.approx(totals[1]["last_step"]["loss"], rel=1e-4)


def test_torchrun_is_that_of_this_python() -> None:
    assert launched("torchrun --nproc_per_node 4") == [
        sys.executable, "-P", "-m", "torch.distributed.run", "--nproc_per_node", "4"]  # fmt: skip
    assert launched("none") == []


@pytest.mark.parametrize("count", [0, 1, 2, 8])
def test_auto_takes_every_visible_gpu(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(machine, "visible_gpus", lambda: tuple(map(str, range(count))))
    words = launched("auto")
    if count < 2:
        assert words == []
    else:
        assert words[-3:] == ["--standalone", "--nproc_per_node", str(count)]
