"""Run as two ranks by test_experts: models of which a rank leaves out parameters, or makes more passes than another.

Every rank asserts that a step has the gradient of one process; 0 is success.
"""

import sys
from pathlib import Path
from typing import Any

from prefpipe.forward.logps import Rows
from prefpipe.models.policy import resolve
from prefpipe.stages.train import loading, loop, parallel
from prefpipe.stages.train.loop import Trainer
from prefpipe.stages.train.optimizer import MasterOptimizer
from prefpipe.stages.train.parallel import World
from tests.stages.train import data
from tests.stages.train.ranks import moments

FULL = {"tuning": "full", "lora_r": 16, "lora_alpha": 32}


def main(mixture: Path, towers: Path, llama: Path) -> None:
    world = parallel.start()
    compare(world, mixture, FULL)
    compare(world, mixture, {**FULL, "router_aux_loss_coef": 0.5})
    compare(world, mixture, {"lora_target_modules": "q_proj", "lora_target_parameters": "experts.down_proj"})
    compare(world, towers, {"lora_target_modules": "q_proj"})  # of the vision tower too, which text does not reach
    compare(world, llama, {}, rows="separate")
    compare(world, llama, {"distributed": "fsdp2"}, rows="separate")
    compare(world, llama, {"distributed": "fsdp2"}, rows="single")
    parallel.stop(world)


def compare(world: World, directory: Path, settings: dict[str, Any], rows: Rows = "shared") -> None:
    """After one step Adam's first moment is 0.1 x the (unclipped) gradient."""
    config = data.config(
        directory, **{"train_batch_size": 5, "max_tokens_per_micro_batch": 70, "max_grad_norm": 1e9, **settings}
    )
    pairs = data.to_train_pairs(data.with_reference(data.bare_pairs(5), directory))
    found = []
    for group in (world, World(0, 1)):
        model = loading.load_policy(resolve(str(directory)), config, group)
        model.set_rows(rows)
        wrapped = parallel.wrap(model, group, config.distributed)
        trainer = Trainer(model, wrapped, MasterOptimizer(wrapped, 0.0), config, group, 70)
        step = next(loop.steps(trainer, pairs, 0))
        found.append((step.values["loss"], moments(trainer)))
    (loss, ours), (expected, theirs) = found
    assert abs(loss - expected) <= 1e-5
    assert theirs.norm() > 0
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), (directory, settings, rows)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
