"""What runs have in common that one process trains one after the other, over the same rows on the same base model.

`sweep` trains so. Rows are read once, the base is loaded once and gets a new adapter for every run, and whatever the
base alone decides is found out once: the reference log-probs that are missing, the values of the audit, how completions
are computed, the tokens of a micro-batch. A run of its own has a `Shared` that nobody else reads.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

from transformers import PreTrainedModel

from prefpipe.config.train import TrainConfig
from prefpipe.forward import load
from prefpipe.forward.logps import Rows, TreeModel
from prefpipe.models.policy import Policy
from prefpipe.stages.train import loading, mapped, parallel, row_files
from prefpipe.stages.train.inputs import TrainingData, for_settings, prepare
from prefpipe.stages.train.parallel import World
from prefpipe.stages.train.reference.values import Kept


@dataclass
class Shared:
    """`data`: the rows as they were read, by settings that need as much of the reference as any run that shares them;
    without them nothing is kept. The counts say what was done, for whoever asks."""

    data: TrainingData | None = None
    reference: Kept = field(init=False)
    loads: int = 0
    probes: int = 0
    _base: PreTrainedModel | None = None
    _rows: Rows | None = None
    _fitting: tuple[int, int] | None = None  # trained numbers of the model that was probed, tokens of a micro-batch

    def __post_init__(self) -> None:
        self.reference = Kept(follow=self.data is not None)

    def rows_for(self, config: TrainConfig) -> TrainingData:
        """The rows of a run. Raises as `prepare` does."""
        return prepare(config) if self.data is None else for_settings(self.data, config)

    def leave(self, data: TrainingData) -> None:
        """After a run: its rows leave the disk of the node, unless other runs share them."""
        if self.data is None and data.stored:
            row_files.remove(data.stored)

    @contextmanager
    def policy(self, policy: Policy, config: TrainConfig, world: World) -> Generator[TreeModel]:
        """The model to train, on the base of the run before where it is there. Full fine-tuning changes every weight:
        its model is loaded anew and not kept, and so is one that ranks cut. Raises as `load_policy` does."""
        base, self._base = self._base, None
        stays = config.tuning == "lora" and not parallel.cuts(world, config.distributed)
        if not stays:
            base = None
        self.loads += base is None
        model = loading.load_policy(policy, config, world, base)
        del base
        try:
            yield model
        finally:
            if self.data is not None and stays:
                self._base = cast(PreTrainedModel, load.with_adapter(model.policy, None))

    def settle(self, model: TreeModel, data: TrainingData, config: TrainConfig) -> None:
        """Choose how the model computes the rows, as for the run before. Raises as `check_vocabulary` does."""
        if self._rows is not None:
            model.set_rows(self._rows)
            return
        loading.check_vocabulary(model, data.computed_rows)
        loading.choose_rows(model, data.computed_rows, config.dtype)
        self._rows = model.rows

    def fitting_tokens(self, model: TreeModel, data: TrainingData, config: TrainConfig, world: World) -> int:
        """Tokens of a micro-batch, by the probe of the run before where no more is trained now than then."""
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if self._fitting is None or trained > self._fitting[0]:
            self.probes += 1
            self._fitting = trained, loading.fitting_tokens(model, mapped.chain(data.rows, data.sft), config, world)
        return self._fitting[1]
