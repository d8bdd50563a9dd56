"""A branch takes rounds of another run by link: none of their data is copied, changed or moved."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from prefpipe.errors import DataError, IdentityError, MissingInputError, UsageError
from prefpipe.runs import store
from prefpipe.runs.store import Manifest
from prefpipe.stages.iterate import stage as iterate
from prefpipe.stages.iterate.branch import check_optimizer
from tests.stages.iterate.cases import PER_ROUND, Make, adapters, in_process, never


def test_a_branch_takes_rounds_by_link_and_goes_on_from_them(
    make: Make, three: tuple[Path, Manifest], tmp_path: Path
) -> None:
    source, whole = three
    out = tmp_path / "new" / "out"
    branch = make(rounds=3, from_run=str(source), from_round=1, learning_rates=[3e-3], train={"learning_rate": 0.0})
    ran: list[str] = []

    def runner(command: str, saved: Path, run_dir: Path) -> None:
        ran.append(f"{run_dir.parent.name}/{run_dir.name}")
        in_process(command, saved, run_dir)

    manifest = iterate.run(branch, out, force=False, runner=runner)
    assert ran == [f"round-{n}/{c}" for n in (2, 3) for c in PER_ROUND]
    taken = [name for name in whole["identity"] if name.startswith(("round-0", "round-1"))]
    assert {name: manifest["identity"][name] for name in taken} == {name: whole["identity"][name] for name in taken}
    assert all((out / f"round-{n}").is_symlink() for n in (0, 1))
    assert not (out / "round-2").is_symlink()
    sampled = [store.read_manifest(run / "round-2/generate")["identity"]["policy"] for run in (source, out)]
    assert sampled[0] == sampled[1]
    assert adapters(out, 2) != adapters(source, 2)
    assert manifest["totals"]["rounds"][:2] == whole["totals"]["rounds"][:2]
    assert iterate.run(branch, out, force=False, runner=never) == manifest


def test_a_branch_of_the_same_settings_is_the_same_run(
    make: Make, three: tuple[Path, Manifest], tmp_path: Path
) -> None:
    source, _ = three
    out = tmp_path / "out"
    iterate.run(make(rounds=2, from_run=str(source), from_round=1), out, force=False, runner=in_process)
    assert adapters(out, 1, 2) == adapters(source, 1, 2)


def test_a_branch_goes_on_with_the_optimizer_of_the_round_that_it_is_from(
    make: Make, three: tuple[Path, Manifest], tmp_path: Path
) -> None:
    """Of a run with new ones as well; the rounds behind are then others. With more rounds it goes on alike."""
    source, out, whole = three[0], tmp_path / "out", tmp_path / "whole"
    made = make(rounds=2, from_run=str(source), from_round=1, optimizer="continue")
    iterate.run(made, out, force=False, runner=in_process)
    taken = store.read_manifest(out / "round-2/train")["inputs"]["optimizer_from"]
    assert taken == store.read_manifest(source / "round-1/train")["digest"]
    assert adapters(out, 1) == adapters(source, 1)
    assert adapters(out, 2) != adapters(source, 2)
    for rounds in (1, 2):
        iterate.run(make(rounds=rounds, optimizer="continue"), whole, force=False, runner=in_process)
    assert adapters(whole, 1, 2) == adapters(out, 1, 2)


def test_a_round_without_the_optimizer_that_it_goes_on_with_is_refused_before_its_first_step(
    make: Make, three: tuple[Path, Manifest], tmp_path: Path
) -> None:
    """It is of another kind, or its files are gone. Training that has begun needs it no more."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(three[0], source, symlinks=True)
    branch = make(rounds=3, from_run=str(source), from_round=1, optimizer="continue")
    other = branch.model_copy(update={"train": branch.train.model_copy(update={"optim": "rmsprop"})})
    with pytest.raises(IdentityError, match="optim = adamw_torch_fused, whose state is not that of rmsprop"):
        iterate.run(other, tmp_path / "other", force=False, runner=never)
    for path in source.glob("round-1/train/checkpoints/step-*/*.safetensors"):
        path.unlink()
    with pytest.raises(DataError, match=f"the optimizer of {out}/round-1/train is lost") as caught:
        iterate.run(branch, out, force=False, runner=never)
    assert "run its command with --force" in caught.value.hint
    assert not (out / "round-2").exists()
    (out / "round-2/train/checkpoints/step-00000001").mkdir(parents=True)
    check_optimizer(branch, out, 2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"from_round": 7, "rounds": 9}, MissingInputError, "round-4 has no complete generate, build-pairs, train"),
        ({"evaluate": {"max_tokens": 9}}, UsageError, "other settings than [evaluate]: max_tokens"),
        ({"evaluate": {"reward": "short_sentence"}}, UsageError, "[evaluate]: reward"),
        ({"train": {"tuning": "full"}}, UsageError, "another tuning than full"),
    ],
)
def test_rounds_that_do_not_fit_are_not_taken(
    make: Make,
    three: tuple[Path, Manifest],
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[DataError],
    message: str,
) -> None:
    source, _ = three
    if changes.get("train"):
        changes = {"train": {"tuning": "full", "lora_r": 16}}
    config = make(**{"rounds": 3, "from_run": str(source), "from_round": 1, **changes})
    with pytest.raises(error) as caught:
        iterate.run(config, tmp_path / "out", force=False, runner=never)
    assert message in caught.value.message
    assert not (tmp_path / "out").exists()


def test_a_damaged_step_is_not_taken_and_stays_where_it_is(
    make: Make, three: tuple[Path, Manifest], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(three[0], source, symlinks=True)
    damaged = source / "round-1/train/metrics.jsonl"
    damaged.write_bytes(damaged.read_bytes() + b" ")
    config = make(rounds=3, from_run=str(source), from_round=1)
    with pytest.raises(DataError, match=r"metrics\.jsonl is damaged or missing"):
        iterate.run(config, tmp_path / "out", force=False, runner=never)
    assert damaged.exists()
    assert not (tmp_path / "out").exists()


def test_rounds_of_another_model_are_not_taken(
    make: Make, three: tuple[Path, Manifest], other_model: Path, tmp_path: Path
) -> None:
    source, _ = three
    config = make(rounds=3, from_run=str(source), from_round=1).model_copy(update={"model": str(other_model)})
    with pytest.raises(UsageError, match="started from weights"):
        iterate.run(config, tmp_path / "out", force=False, runner=never)


def test_rounds_are_not_taken_from_a_run_of_another_command(
    make: Make, three: tuple[Path, Manifest], tmp_path: Path
) -> None:
    step = three[0] / "round-1" / "train"
    with pytest.raises(UsageError, match="is a run of train; --from-run needs a run of iterate"):
        iterate.run(make(rounds=3, from_run=str(step), from_round=1), tmp_path / "out", force=False, runner=never)
