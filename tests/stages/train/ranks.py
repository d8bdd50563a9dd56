"""Run as two ranks by test_parallel: what only a process group of two can show. Every rank asserts; 0 is success."""

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from prefpipe import reading
from prefpipe.errors import StorageError
from prefpipe.forward import shards, tensor_files
from prefpipe.forward.layout import flatten
from prefpipe.forward.load import decoder_layers
from prefpipe.forward.logps import Rows, TreeModel
from prefpipe.models.policy import resolve
from prefpipe.runs import fsio
from prefpipe.runs.store import Run
from prefpipe.stages.train import checkpoint, loading, loop, parallel, shared_files
from prefpipe.stages.train.background import Background
from prefpipe.stages.train.examples import TrainPair
from prefpipe.stages.train.loop import Trainer
from prefpipe.stages.train.micro_batches import tree_of
from prefpipe.stages.train.optimizer import MasterOptimizer
from prefpipe.stages.train.parallel import World
from prefpipe.stages.train.session import Session
from tests.stages.train import data
from tests.tiny import make_adapter


def main(model_directory: Path, strategies: Sequence[str]) -> None:
    world = parallel.start()
    assert world.size == 2
    assert world.leads == (world.rank == 0)
    assert world.tell(f"from {world.rank}") == "from 0"
    assert world.gather(world.rank) == [0, 1]
    directory = Run(Path("out"), "train", "", {}, {}, "")
    assert Session(world, directory if world.leads else None).lead(lambda run: run.out) == Path("out")
    assert Session(world, None).lead(lambda run: run.out) is None
    assert parallel.sum_over_ranks({"a": 1.0 + world.rank} if world.rank else {}, world) == {"a": 2.0}
    check_files(world)
    pairs = data.to_train_pairs(data.with_reference(data.bare_pairs(5), model_directory))
    for strategy in strategies:
        check_adapter(model_directory, strategy, world)
        check_values(start(model_directory, strategy, world), data.trainer(data.policy(model_directory), CONFIG), pairs)
        check_gradient(model_directory, strategy, world, pairs, "shared")
        check_gradient(model_directory, strategy, world, pairs, "separate")
        check_gathered(start(model_directory, strategy, world), pairs) if strategy == "fsdp2" else None
        check_gradient(model_directory, strategy, world, pairs, "shared", "full")
        for tuning in ("lora", "full"):
            check_state(model_directory, strategy, world, pairs, "float32", tuning)
            check_state(model_directory, strategy, world, pairs, "bfloat16", tuning)
    parallel.stop(world)


def check_files(world: World) -> None:
    """Rows of two ranks in one file, also where a rank has fewer or none; an error of one is raised on both."""
    wholes = {str(rows): torch.arange(rows * 2.0).reshape(rows, 2) for rows in (1, 2, 5)} | {"plain": torch.ones(3)}
    mesh = init_device_mesh("cpu", (2,))
    cut = {n: t if n == "plain" else distribute_tensor(t, mesh, [Shard(0)]) for n, t in wholes.items()}
    files = tensor_files.plan({n: (t.dtype, t.shape) for n, t in wholes.items()}, "w", 32)
    folder = Path(world.tell(tempfile.mkdtemp() if world.leads else ""))
    digests = shared_files.write(world, folder if world.leads else None, files, cut)
    assert digests == [reading.file_digest(folder / file.name) for file in files]
    for stored in (tensor for file in files for tensor in tensor_files.stored(folder / file.name).items()):
        name, tensor = stored
        assert torch.equal(tensor.whole(), wholes[name])
        again = torch.zeros_like(cut[name])
        shards.fill(again, tensor)
        assert torch.equal(shards.whole(again), wholes[name])
    os.environ["PREFPIPE_FAULT"] = "pwrite:1:enospc" if world.rank else ""
    try:
        for file in files:
            world.tell((folder / file.name).unlink() if world.leads else None)
        shared_files.write(world, folder if world.leads else None, files, cut)
    except StorageError as error:
        assert "no space left" in str(error)  # noqa: PT017
    else:
        raise AssertionError
    del os.environ["PREFPIPE_FAULT"]
    for fault in ("", "pwrite:1:enospc"):
        fsio._passes.clear()
        os.environ["PREFPIPE_FAULT"] = fault if world.rank else ""
        check_background(world, folder / f"background{fault}", cut, fails=bool(fault))
    del os.environ["PREFPIPE_FAULT"]
    if world.leads:
        shutil.rmtree(folder)


def check_background(world: World, folder: Path, cut: Mapping[str, torch.Tensor], *, fails: bool) -> None:
    """A checkpoint of cut tensors that change while threads write it, step by step, is that of the moment; an error of
    one rank's thread is raised on both."""
    wanted = {name: shards.whole(tensor).clone() for name, tensor in cut.items()}
    saving, ended = Background(world), None

    def write(tensors: Mapping[str, torch.Tensor | shards.Copied], relayed: World) -> None:
        checkpoint.save(folder, checkpoint.Checkpoint(1, 0, "", tensors), "f", world=relayed)

    saving.save(1, cut, write, last=False)
    assert saving._save is not None
    try:
        while saving._save is not None:
            for tensor in cut.values():
                tensor.add_(1)
            saving.after_step()
    except StorageError as error:
        ended = error
    assert all(world.gather((ended is not None) == fails))
    if fails:
        assert not list(folder.iterdir())
    else:
        saved = checkpoint.at_step(folder, 1, world)
        assert all(torch.equal(saved.tensors[name].whole(), wanted[name]) for name in wanted)
        assert all(not torch.equal(shards.whole(cut[name]), wanted[name]) for name in wanted)


def check_adapter(model_directory: Path, strategy: str, world: World) -> None:
    """An adapter that is trained on has the values of its file on both ranks."""
    place = Path(world.tell(tempfile.mkdtemp() if world.leads else "")) / "a"
    world.tell(make_adapter(model_directory, place, seed=4) if world.leads else None)
    config = data.config(model_directory, adapter=str(place), distributed=strategy)
    model = loading.load_policy(resolve(str(model_directory), str(place)), config, world)
    whole = parallel.whole_adapter(model.policy)
    stored = load_file(place / "adapter_model.safetensors")
    assert len(whole) == len(stored)
    same = all(torch.equal(whole[name.replace(".weight", ".default.weight")], stored[name]) for name in stored)
    assert all(world.gather(same))
    if world.leads:
        shutil.rmtree(place.parent)


CONFIG = data.config(Path(), train_batch_size=5, max_tokens_per_micro_batch=40, max_grad_norm=1e9)


def policy(
    model_directory: Path, dtype: str, tuning: str, strategy: str = "ddp", world: World = parallel.ALONE
) -> TreeModel:
    """As a run starts: with a new adapter, or with every weight trained."""
    settings: dict[str, object] = {"dtype": dtype, "distributed": strategy}
    settings |= {"tuning": "full", "lora_r": 16, "lora_alpha": 32} if tuning == "full" else {}
    return loading.load_policy(resolve(str(model_directory)), data.config(model_directory, **settings), world)


def start(
    model_directory: Path, strategy: str, world: World, *, rows: Rows = "shared", dtype: str = "float32",
    tuning: str = "lora",
) -> Trainer:  # fmt: skip
    model = policy(model_directory, dtype, tuning, strategy, world)
    model.set_rows(rows)
    wrapped = parallel.wrap(model, world, strategy)
    started = Trainer(model, wrapped, MasterOptimizer(wrapped, 0.0), CONFIG, world, CONFIG.max_tokens_per_micro_batch)
    check_shards(started, strategy, tuning)
    return started


def check_shards(trainer: Trainer, strategy: str, tuning: str) -> None:
    """FSDP2: every parameter is cut over the two ranks, also those outside of the layers; DDP: none is."""
    for name, parameter in trainer.model.named_parameters():
        assert isinstance(parameter, DTensor) == (strategy == "fsdp2"), name
        if isinstance(parameter, DTensor):
            assert parameter.placements[0].is_shard(), name
            assert parameter.to_local().numel() < parameter.numel(), name
    layers = decoder_layers(trainer.model.policy)
    assert len(layers) == 2
    for layer in layers:
        parameters = list(layer.parameters())
        # Two norms, seven matrices, and their A and B where there is an adapter.
        assert len(parameters) == 2 + 7 + (14 if tuning == "lora" else 0)
        assert all(isinstance(p, DTensor) == (strategy == "fsdp2") for p in parameters)


def check_values(two: Trainer, one: Trainer, pairs: Sequence[TrainPair]) -> None:
    layout = flatten([tree_of(p) for p in pairs])
    with torch.no_grad():
        torch.testing.assert_close(two.wrapped(layout), one.model(layout), rtol=0, atol=2e-5)


def check_gradient(
    model_directory: Path, strategy: str, world: World, pairs: Sequence[TrainPair], rows: Rows, tuning: str = "lora"
) -> None:
    """After one step Adam's first moment is 0.1 x the (unclipped) gradient: within 1e-5 of that of one process."""
    two = start(model_directory, strategy, world, rows=rows, tuning=tuning)
    model = policy(model_directory, "float32", tuning)
    model.set_rows(rows)
    one = data.trainer(model, CONFIG)
    ours, theirs = (next(loop.steps(trainer, pairs, 0)).values for trainer in (two, one))
    assert ours.keys() == theirs.keys()
    assert all(abs(ours[k] - theirs[k]) <= 1e-5 * max(1.0, abs(theirs[k])) for k in theirs)
    mine, other = (moments(trainer) for trainer in (two, one))
    assert other.norm() > 0
    assert (mine - other).norm() <= 1e-5 * other.norm()


def check_gathered(trainer: Trainer, pairs: Sequence[TrainPair]) -> None:
    """While the last layer computes, in either pass, the first one is in its shards and nobody has fetched it."""
    first, last = decoder_layers(trainer.model.policy)
    (group,) = first._get_fsdp_state()._fsdp_param_groups
    seen: list[bool] = []

    def look(*_: object) -> None:
        held = group.comm_ctx.all_gather_state
        seen.append(group.is_sharded and group._all_gather_result is None and held is None)

    handle = last.mlp.down_proj.register_forward_hook(lambda *call: (look(), call[-1].register_hook(look))[0])
    trainer.wrapped(flatten([tree_of(p) for p in pairs])).sum().backward()
    handle.remove()
    assert seen == [True, True]


def moments(trainer: Trainer) -> torch.Tensor:
    state = sorted(trainer.optimizer.state().items())
    return torch.cat([shards.whole(v).flatten() for k, v in state if k.startswith("exp_avg/")])


def check_state(
    model_directory: Path, strategy: str, world: World, pairs: Sequence[TrainPair], dtype: str, tuning: str
) -> None:
    """State is named as in one process, whole when gathered, and another model takes it over, cut alike or not."""
    names = {n for n, p in policy(model_directory, dtype, tuning).named_parameters() if p.requires_grad}
    started = start(model_directory, strategy, world, dtype=dtype, tuning=tuning)
    next(loop.steps(started, pairs, 0))
    state = {key: shards.whole(tensor).clone() for key, tensor in started.optimizer.state().items()}
    assert {key.partition("/")[2] for key in state} == names
    own = trained(started)
    assert own.keys() == names
    assert all(torch.equal(state[f"master/{n}"].to(t.dtype), t) for n, t in own.items())
    assert all(bool(t.isfinite().all()) for t in state.values())
    for mine, other in zip(*world.gather(list(state.values())), strict=True):
        assert torch.equal(mine, other)
    fresh = start(model_directory, strategy, world, dtype=dtype, tuning=tuning)
    fresh.optimizer.load_state(world.tell(state))
    check_shards(fresh, strategy, tuning)
    again = {key: shards.whole(tensor) for key, tensor in fresh.optimizer.state().items()}
    assert again.keys() == state.keys()
    assert all(torch.equal(again[k], state[k]) for k in state)
    assert all(torch.equal(t, own[n]) for n, t in trained(fresh).items())


def trained(trainer: Trainer) -> dict[str, torch.Tensor]:
    parameters = trainer.model.named_parameters()
    return {name: shards.whole(p.detach()).clone() for name, p in parameters if p.requires_grad}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
