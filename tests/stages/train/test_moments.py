"""A run goes on with the optimizer of a run before it: the same tensors, the same bits, by content, or refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError, IdentityError, MissingInputError, PrefpipeError, UsageError
from prefpipe.runs import store
from prefpipe.stages.train import inputs, moments, stage
from prefpipe.stages.train.session import Paused
from tests.forge import Forge
from tests.stages.train import data
from tests.stages.train.runs import adapter, two_ranks

Make = Callable[..., TrainConfig]
LORA = {"lora_r": 16, "lora_alpha": 32}  # the defaults, which full fine-tuning leaves alone


@pytest.fixture(scope="module")
def make(tiny_model: Path, pairs: Path) -> Make:
    """One pass over ten pairs in the order of the file, at one learning rate: three steps. What fits into the memory of
    the machine decides nothing."""
    fixed = {"num_train_epochs": 1, "train_order": "given", "lr_scheduler_type": "constant"}
    fixed |= {"max_tokens_per_micro_batch": 128, "gradient_checkpointing": "off"}
    return lambda **changes: data.config(tiny_model, pairs, **{**fixed, **changes})


@pytest.fixture(scope="module")
def first(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("first") / "t"
    stage.run(make(), out, force=False)
    return out


def after(first: Path, **changes: Any) -> dict[str, Any]:
    """Settings that go on with weights and optimizer of a run."""
    return {"adapter": str(first / "adapter"), "optimizer_from": str(first), **changes}


def test_two_runs_of_one_epoch_are_one_of_two_to_the_bit(
    make: Make, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name, changes in {
        "whole": {"num_train_epochs": 2},
        "on": after(first),
        "new": {"adapter": str(first / "adapter")},
    }.items():
        stage.run(make(**changes), tmp_path / name, force=False)
    assert adapter(tmp_path / "on") == adapter(tmp_path / "whole")
    assert adapter(tmp_path / "new") != adapter(tmp_path / "whole")
    said = capsys.readouterr().err
    assert said.count(f"the optimizer goes on with that of {first} after its step 3") == 1
    assert "ended with other weights" not in said


def test_every_weight_is_trained_on_to_the_bit(make: Make, tmp_path: Path):
    """In float32, in which a model is saved as it is."""
    full = {"tuning": "full", **LORA, "learning_rate": 1e-3, "optim": "rmsprop"}
    stage.run(make(**full, num_train_epochs=2), tmp_path / "whole", force=False)
    stage.run(make(**full), tmp_path / "one", force=False)
    goes_on = make(**full, reference_model=make().model, optimizer_from=str(tmp_path / "one"))
    stage.run(goes_on.model_copy(update={"model": str(tmp_path / "one/model")}), tmp_path / "two", force=False)
    ours, theirs = ((tmp_path / name / "model/model.safetensors").read_bytes() for name in ("two", "whole"))
    assert ours == theirs


def test_a_run_that_was_cut_needs_the_other_checkpoint_no_more(make: Make, first: Path, tmp_path: Path):
    """Nor does one that is complete: the other run is known by its manifest, wherever it lies."""
    stage.run(make(**after(first)), tmp_path / "whole", force=False)
    source, out = tmp_path / "elsewhere", tmp_path / "cut"
    shutil.copytree(first, source)
    with pytest.raises(Paused):
        stage.run(make(**after(source)), out, force=False, until=1)
    shutil.rmtree(source / "checkpoints")
    manifest = stage.run(make(**after(source)), out, force=False)
    assert manifest["digest"] == store.read_manifest(tmp_path / "whole")["digest"]
    assert adapter(out) == adapter(tmp_path / "whole")
    assert stage.run(make(**after(source)), out, force=False) == manifest


def test_a_run_with_another_optimizer_is_another_run(make: Make, first: Path, tmp_path: Path):
    stage.run(make(**after(first)), tmp_path / "t", force=False)
    stage.run(make(seed=1), tmp_path / "other", force=False)
    for changes in (after(first, optimizer_from="none"), after(first, optimizer_from=str(tmp_path / "other"))):
        with pytest.raises(UsageError, match="input:optimizer_from"):
            stage.run(make(**changes), tmp_path / "t", force=False)


def test_moments_of_other_weights_are_taken_with_a_warning(
    make: Make, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    stage.run(make(optimizer_from=str(first)), tmp_path / "t", force=False)
    assert f"{first} ended with other weights than those that are trained" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"lora_r": 8}, IdentityError, ["lora_A", "is [4, ", "there and [8, "]),
        ({"lora_target_modules": "q_proj,v_proj"}, IdentityError, ["it has 20 tensors more, such as "]),
        ({"tuning": "full", **LORA}, IdentityError, ["it has none of 20 tensors such as ", "it has 28 tensors more"]),
        ({"optim": "rmsprop"}, IdentityError, ["optim = adamw_torch_fused, whose state is not that of rmsprop"]),
    ],
)
def test_an_optimizer_of_something_else_is_refused_with_what_differs(
    make: Make, first: Path, tmp_path: Path, changes: dict[str, Any], error: type[PrefpipeError], words: list[str]
):
    with pytest.raises(error) as caught:
        stage.run(make(optimizer_from=str(first), **changes), tmp_path / "t", force=False)
    assert all(word in caught.value.message for word in words), caught.value.message


def test_a_variant_of_a_sweep_has_the_optimizer_of_its_run_or_is_refused(make: Make, first: Path):
    data = inputs.prepare(make(**after(first)))
    assert inputs.for_settings(data, make(**after(first, learning_rate=1e-4))).optimizer is data.optimizer
    with pytest.raises(IdentityError, match="whose state is not that of rmsprop"):
        inputs.for_settings(data, make(**after(first, optim="rmsprop")))


def a_flipped_bit(run: Path) -> None:
    path = run / "checkpoints/step-00000003/state.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def no_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def other_metrics(run: Path) -> None:
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('"step": 0', '"step": 1', 1))


def no_manifest(run: Path) -> None:
    (run / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (a_flipped_bit, DataError, "its checkpoint 3 is damaged or missing"),
        (no_checkpoints, DataError, "its checkpoint 3 is damaged or missing"),
        (other_metrics, DataError, "does not belong to its metrics.jsonl"),
        (no_manifest, MissingInputError, "holds no complete run"),
    ],
)
def test_a_damaged_optimizer_is_never_taken(
    make: Make, first: Path, tmp_path: Path, damage: Callable[[Path], None], error: type[PrefpipeError], words: str
):
    source = tmp_path / "source"
    shutil.copytree(first, source)
    damage(source)
    with pytest.raises(error) as caught:
        stage.run(make(**after(source)), tmp_path / "t", force=False)
    assert words in caught.value.message
    assert not (tmp_path / "t/manifest.json").exists()


def test_a_run_of_something_else_has_no_optimizer(make: Make, pairs: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="is a run of build-pairs"):
        stage.run(make(optimizer_from=str(pairs)), tmp_path / "t", force=False)


@pytest.mark.parametrize(("best", "step"), [(True, 4), (False, 6)])
def test_the_optimizer_is_that_of_the_weights_which_a_run_ended_with(make: Make, tmp_path: Path, best: bool, step: int):
    """Patience to stop early names a best evaluation too, and ends with the last weights."""
    config = make(eval_split=0.4, early_stopping_patience=2, load_best_model_at_end=best)
    with store.open_run(tmp_path / "t", "train", config, {}, force=False) as run:
        run.finish({"steps": 6, "best": {"step": 4, "metric": "eval_loss", "value": 0.5}}, {})
    found = moments.source(make(optimizer_from=str(tmp_path / "t")))
    assert found is not None
    assert found.step == step


def test_two_ranks_go_on_with_the_optimizer_of_one_process(forged: Forge, make: Make, first: Path, tmp_path: Path):
    """Each reads its rows of it (FSDP2): their step is the one that a process alone takes."""
    config = make(**after(first, train_batch_size=10, distributed="fsdp2"))
    (tmp_path / "two.json").write_text(config.model_dump_json())
    done = two_ranks(forged, "train", tmp_path / "two.json", "--out", tmp_path / "two")
    assert done.code == 0, done.stderr[-4000:]
    assert done.stderr.count("the optimizer goes on with that of") == 1
    stage.run(make(**after(first, train_batch_size=10)), tmp_path / "one", force=False)
    ours, theirs = (state(tmp_path / name) for name in ("two", "one"))
    assert ours.keys() == theirs.keys()
    assert {float(value) for name, value in ours.items() if name.startswith("step/")} == {4.0}
    for name, value in theirs.items():
        assert float((ours[name] - value).norm()) <= 1e-4 * float(value.norm()), name


def state(run: Path) -> dict[str, Any]:
    """Moments and step counts after the only step."""
    tensors = load_file(run / "checkpoints/step-00000001/state.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith(("step/", "exp_avg"))}
