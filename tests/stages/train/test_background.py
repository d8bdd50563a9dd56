"""Checkpoints that are written while training goes on: what they hold, when training waits, how errors reach it.

Ranks are threads here that meet at a barrier; `ranks.py` has two real ones.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from prefpipe import machine
from prefpipe.errors import Interrupted, PrefpipeError, StorageError
from prefpipe.forward import shards, tensor_files
from prefpipe.forward.shards import Copied
from prefpipe.stages.train import background, checkpoint, shared_files, stage
from prefpipe.stages.train.background import Background
from prefpipe.stages.train.checkpoint import Checkpoint
from prefpipe.stages.train.parallel import ALONE, World
from tests.stages.train import data

SECONDS = 60  # a test that would wait for ever ends with an error


def moving() -> dict[str, torch.Tensor]:
    """The tensors of a training that goes on: a step changes them in place."""
    return {"master/w": torch.arange(6.0).reshape(3, 2), "step/w": torch.tensor(1.0), "none": torch.zeros(0, 4)}


def step(tensors: Mapping[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        tensor.add_(1)


def writer(folder: Path, before: Callable[[], object] = lambda: None) -> background.Write:
    def write(tensors: Mapping[str, torch.Tensor | Copied], world: World) -> None:
        before()
        checkpoint.save(folder, Checkpoint(1, 0, "", tensors), "f", world=world)

    return write


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def plain(tmp_path: Path) -> dict[str, bytes]:
    """A checkpoint that was written while training waited."""
    writer(tmp_path / "plain")(moving(), ALONE)
    return contents(tmp_path / "plain")


def test_the_bytes_are_those_of_the_moment_though_training_goes_on(tmp_path: Path, plain: dict[str, bytes]):
    tensors, go_on = moving(), threading.Event()
    saving = Background(ALONE)
    saving.save(1, tensors, writer(tmp_path / "b", lambda: go_on.wait(SECONDS)), last=False)
    for _ in range(3):
        step(tensors)
        saving.after_step()
    assert not (tmp_path / "b").exists()
    go_on.set()
    saving.wait()
    assert contents(tmp_path / "b") == plain
    saving.save(2, tensors, writer(tmp_path / "c"), last=False)
    saving.wait()
    assert contents(tmp_path / "c") != plain


@pytest.mark.parametrize(("last", "available"), [(True, 1 << 40), (False, 0)])
def test_training_waits_for_the_last_one_and_where_no_copy_fits(
    tmp_path: Path, plain: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, last: bool, available: int
):
    monkeypatch.setattr(machine, "available_memory", lambda: available)
    threads: list[threading.Thread] = []
    saving = Background(ALONE)
    write = writer(tmp_path / "b", lambda: threads.append(threading.current_thread()))
    saving.save(1, moving(), write, last=last)
    assert threads == [threading.current_thread()]
    assert contents(tmp_path / "b") == plain


@pytest.mark.parametrize(("is_cut", "ranks"), [(True, 8), (False, 1)])
def test_a_copy_of_every_rank_of_the_node_must_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_cut: bool, ranks: int
):
    """64 MB in 1/16 of the memory, eight times where eight ranks have rows. Once it is said that they do not fit."""
    tensors = {"w": torch.zeros(16 << 20)}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(shards, "is_cut", lambda _: is_cut)
    saving = Background(ALONE)
    for available, fits in ((ranks << 30, True), ((ranks << 30) - 16, False), ((ranks << 30) - 16, False)):
        monkeypatch.setattr(machine, "available_memory", lambda available=available: available)
        assert saving._fits(tensors) is fits
    said = "training waits for its checkpoints: the host has no room for a copy of 64 MiB"
    assert capsys.readouterr().err.count(said) == 1


def test_the_seconds_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(background.clock, "monotonic", lambda: next(clock))
    saving = Background(ALONE)
    saving.save(7, moving(), writer(tmp_path / "b"), last=True)
    assert "checkpoint after step 7: training waited 10.0 s, writing took 10.0 s" in capsys.readouterr().err
    monkeypatch.setattr(background, "_SAID_FROM_S", 1e9)
    saving.save(8, moving(), writer(tmp_path / "c"), last=True)
    assert capsys.readouterr().err == ""


def no_space(*_: object) -> None:
    raise StorageError("no space left", "free some")


def a_mistake(*_: object) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(("wrong", "error"), [(no_space, StorageError), (a_mistake, ZeroDivisionError)])
def test_an_error_of_the_thread_ends_the_run_once(wrong: background.Write, error: type[Exception]):
    saving = Background(ALONE)
    saving.save(1, moving(), wrong, last=False)
    with pytest.raises(error):
        saving.wait()
    saving.wait()
    saving.save(2, moving(), wrong, last=False)
    assert saving._save is not None
    saving._save.thread.join(SECONDS)
    with pytest.raises(error):
        saving.after_step()


def test_after_an_error_of_the_run_the_save_is_finished(tmp_path: Path, plain: dict[str, bytes]):
    def run() -> None:
        with background.background(ALONE) as saving:
            saving.save(1, moving(), writer(tmp_path / "b"), last=False)
            raise DataLost

    with pytest.raises(DataLost):
        run()
    assert contents(tmp_path / "b") == plain


class DataLost(Exception):
    """Something that ends a run."""


def test_a_second_signal_waits_for_nothing(tmp_path: Path):
    go_on = threading.Event()

    def run() -> None:
        with background.background(ALONE) as saving:
            saving.save(1, moving(), writer(tmp_path / "b", lambda: go_on.wait(SECONDS)), last=False)
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        run()
    assert not (tmp_path / "b").exists()
    go_on.set()
    for thread in threading.enumerate():  # none is left that would read the clock of another test
        if thread.name == "checkpoint":
            thread.join()


@dataclass(frozen=True)
class Meeting(World):
    """Ranks that are threads of this process. `slots` are common to all."""

    slots: list[Any] = field(default_factory=list)
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))

    def gather(self, value: Any) -> list[Any]:
        self.slots[self.rank] = value
        self.barrier.wait(SECONDS)
        found = list(self.slots)
        self.barrier.wait(SECONDS)
        return found

    def tell(self, value: Any) -> Any:
        return self.gather(value)[0]


def on_ranks(work: Callable[[World], object], size: int = 2) -> list[Any]:
    """What `work` returns, or the error that it raises, on every rank."""
    slots, barrier = [None] * size, threading.Barrier(size)

    def rank(number: int) -> object:
        try:
            return work(Meeting(number, size, slots, barrier))
        except PrefpipeError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors count as cut, though every rank has all rows: all write the same ones."""
    monkeypatch.setattr(shards, "is_cut", lambda _: True)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_write_a_checkpoint_between_steps(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch):
    """The digests of several files are dealt out to them."""
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 8)
    writer(tmp_path / "several")(moving(), ALONE)

    def run(world: World) -> int:
        tensors, steps = moving(), 0
        with background.background(world) as saving:
            saving.save(1, tensors, writer(tmp_path / "b"), last=False)
            while saving._save is not None and steps < 3:
                step(tensors)
                saving.after_step()
                steps += 1
        return steps

    assert on_ranks(run, size) == [3] * size  # four exchanges are needed: the last in `wait`
    assert contents(tmp_path / "b") == contents(tmp_path / "several")
    assert len(contents(tmp_path / "b")) == 3


def test_what_no_rank_shares_rank_0_writes_alone(tmp_path: Path, plain: dict[str, bytes]):
    """No exchange between steps is needed, and an error of its run does not cost the checkpoint."""

    def run(world: World) -> None:
        with background.background(world) as saving:
            saving.save(1, moving(), writer(tmp_path / "b"), last=False)
            raise StorageError("of the run", "")

    assert [type(error) for error in on_ranks(run)] == [StorageError] * 2
    assert contents(tmp_path / "b") == plain


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place", ["_make", "_fill", "publish"])
def test_an_error_of_one_rank_is_raised_on_all_and_nothing_is_visible(
    tmp_path: Path, rank: int, place: str, monkeypatch: pytest.MonkeyPatch
):
    whole = getattr(shared_files, place, None)
    mine = threading.local()

    def wrong(*arguments: Any) -> Any:
        return no_space() if mine.rank == rank else whole(*arguments) if whole else None

    if whole:
        monkeypatch.setattr(shared_files, place, wrong)

    def run(world: World) -> None:
        write = writer(tmp_path / "b")

        def on_rank(tensors: Mapping[str, torch.Tensor | Copied], relayed: World) -> None:
            mine.rank = relayed.rank
            write(tensors, relayed)
            if place == "publish" and relayed.rank == rank:
                no_space()

        with background.background(world) as saving:
            saving.save(1, moving(), on_rank, last=False)
            while True:
                saving.after_step()

    assert [type(error) for error in on_ranks(run)] == [StorageError] * 2
    assert (place == "publish") or not contents(tmp_path / "b")


@pytest.mark.usefixtures("cut")
def test_a_rank_that_leaves_leaves_nothing_behind(tmp_path: Path):
    """Rank 0 ends with an error of the run while its thread waits for the other rank."""

    def run(world: World) -> None:
        saving = Background(world)
        saving.save(1, moving(), writer(tmp_path / "b"), last=False)
        assert saving._save is not None
        saving._save.heard(wait=True)
        saving.give_up()

    assert on_ranks(run) == [None, None]
    assert not contents(tmp_path / "b")


def test_a_run_has_the_same_files_whether_training_waits_or_not(
    tiny_model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every checkpoint to the byte, and the adapter; most of the checkpoints were written in a thread."""
    config = data.config(
        tiny_model, pairs, save_total_limit=20, eval_split=0.3, eval_steps=2, load_best_model_at_end=True
    )
    saved: list[bool] = []
    plain = Background.save

    def save(self: Background, *arguments: Any, last: bool) -> None:
        plain(self, *arguments, last=last)
        saved.append(self._save is not None)

    monkeypatch.setattr(Background, "save", save)
    stage.run(config, tmp_path / "one", force=False)
    assert saved.count(True) >= 3
    assert saved.count(False) == 1  # the last
    saved.clear()
    monkeypatch.setattr(Background, "_fits", lambda *_: False)
    stage.run(config, tmp_path / "two", force=False)
    assert not any(saved)
    for name in ("checkpoints", "adapter"):
        assert contents(tmp_path / "one" / name) == contents(tmp_path / "two" / name)


def test_stored_tensors_are_those_that_were_copied(tmp_path: Path):
    """Of every dtype and layout, in the file and as the plan says."""
    wanted = {"t": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(3, dtype=torch.bfloat16), "i": torch.tensor(3)}
    saving = Background(ALONE)
    saving.save(1, wanted, writer(tmp_path), last=False)
    saving.wait()
    found = tensor_files.stored(tmp_path / "step-00000001" / "state.safetensors")
    assert all(torch.equal(found[name].whole(), tensor) for name, tensor in wanted.items())
