"""What a rank needs in memory, from the config of a model alone: parameters are counted and a step is passed on the
meta device, so that no weight is read and none is allocated. The rest is arithmetic on these counts.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

from prefpipe.config.train import TrainConfig
from prefpipe.forward import load, lora_targets, meta_pass
from prefpipe.forward.head import chunk_bytes
from prefpipe.forward.layout import Tree
from prefpipe.forward.logps import causal_model
from prefpipe.forward.meta_pass import Held
from prefpipe.forward.weights import DTYPES
from prefpipe.stages.train.host_copies import pinned_bytes
from prefpipe.stages.train.memory import SHARE

RANKS = (1, 2, 4, 8, 16, 32, 64)
# Bytes of a weight in nf4: 4 bits, a scale of 8 bits for 64 weights, one of 32 bits for 256 scales.
_IN_4_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)
_MOMENTS = {"adamw_torch_fused": 8, "rmsprop": 4, "adamw_8bit": 2, "paged_adamw_8bit": 2, "paged_adamw_32bit": 8}
_MASTER = 8  # bytes of a trained weight of less than 32 bits: a float32 copy and its gradient


@dataclass(frozen=True)
class Setting:
    """What a user may change: the number of ranks, the trees of a micro-batch, and settings of these names."""

    ranks: int
    trees: int
    distributed: Literal["ddp", "fsdp2"]
    checkpointing: bool
    tuning: Literal["lora", "full"]
    in_4bit: bool

    @property
    def cut(self) -> int:
        """The number of parts that parameters are cut into."""
        return self.ranks if self.distributed == "fsdp2" else 1


@dataclass(frozen=True)
class Need:
    """Bytes of a rank by part."""

    # The frozen weights, and buffers.
    weights: float
    # Trained weights, and their gradients.
    trained: float
    # Moments, and float32 masters with their gradients where the weights are not float32.
    optimizer: float
    # Layers that fsdp2 gathers to compute them, with gradients that are not cut yet; a matrix taken out of 4 bits.
    gathered: float
    # What the forward pass keeps for backward, and what both passes take beside it at their highest point.
    kept: float
    passing: float
    # What it writes into a checkpoint: masters and moments.
    checkpoint: float
    # What its copy on the host takes, from which it is written while training goes on.
    host_copy: float

    @property
    def peak(self) -> float:
        """Bytes at the highest point of a step."""
        return self.weights + self.trained + self.optimizer + self.gathered + self.kept + self.passing

    def fits(self, memory: float) -> bool:
        """Whether `train` would say that a step fits: beside weights it leaves a share of what is free to others."""
        held = self.weights + self.trained / 2
        return self.peak - held <= SHARE * (memory - held)


class Model:
    """A model on the meta device as it would be trained with some tuning."""

    def __init__(self, config: TrainConfig, directory: Path, adapter: Path | None) -> None:
        self.dtype = DTYPES[config.dtype]
        base = meta_pass.described_model(directory, config.dtype)
        self.name = type(base).__name__
        self.policy: torch.nn.Module = base
        if config.tuning == "full":
            load.train_all(base)
        elif adapter is not None:
            shape = LoraConfig.from_pretrained(str(adapter))
            shape.inference_mode, shape.base_model_name_or_path = False, None
            self.policy = get_peft_model(base, shape, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
        else:
            self.policy = load.add_lora(
                base,
                r=config.lora_r,
                alpha=config.lora_alpha,
                target_modules=config.lora_target_modules,
                target_parameters=config.lora_target_parameters,
                seed=None,
                rslora=config.use_rslora,
            )
        causal = causal_model(self.policy)
        lora_targets.check_parameters(causal, lora_dropout=config.lora_dropout, distributed=config.distributed)
        for parameter in self.policy.parameters():  # peft makes float32 on this device
            parameter.data = parameter.data.to(self.dtype)
        self._held: dict[tuple[int, int, bool], Held] = {}

    @cached_property
    def frozen(self) -> list[torch.Tensor]:
        """Parameters that are not trained."""
        return [p for p in self.policy.parameters() if not p.requires_grad]

    @cached_property
    def trained(self) -> list[torch.Tensor]:
        """Parameters that are."""
        return [p for p in self.policy.parameters() if p.requires_grad]

    @cached_property
    def in_4bit(self) -> list[torch.Tensor]:
        """The matrices that bitsandbytes holds in 4 bits: linear modules, all but the head."""
        causal = causal_model(self.policy)
        head = causal.get_output_embeddings()
        linear = (m for m in causal.modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head)
        return [m.weight for m in linear if not m.weight.requires_grad and "lora" not in type(m).__module__]

    @cached_property
    def layer(self) -> tuple[int, int]:
        """Parameters of the largest layer, and how many of them are trained."""
        counts = [_counts(list(layer.parameters())) for layer in load.decoder_layers(self.policy)]
        return max(total for total, _ in counts), max(trained for _, trained in counts)

    @cached_property
    def root(self) -> tuple[int, int]:
        """The same of all that is in no layer: embedding, head, last norm."""
        layers = {id(p) for layer in load.decoder_layers(self.policy) for p in layer.parameters()}
        return _counts([p for p in self.policy.parameters() if id(p) not in layers])

    @cached_property
    def head_chunk(self) -> int:
        """The most bytes that the head takes at once."""
        return chunk_bytes(cast(torch.nn.Linear, causal_model(self.policy).get_output_embeddings()).weight)

    def held(self, tree: Tree, trees: int, *, checkpointing: bool) -> Held:
        """What the passes of a micro-batch hold that is this tree so many times."""
        key = (id(tree), trees, checkpointing)
        if key not in self._held:
            self._held[key] = meta_pass.held(self.policy, [tree] * trees, checkpointing=checkpointing)
        return self._held[key]


class Forecast:
    """The memory of a rank under any setting, for a longest row."""

    def __init__(self, config: TrainConfig, directory: Path, adapter: Path | None, tree: Tree) -> None:
        self.config = config
        self.tree = tree
        self._place = directory, adapter
        self._models: dict[str, Model] = {}

    def model(self, tuning: Literal["lora", "full"]) -> Model:
        """The model with this tuning; one that is not that of the settings has an adapter by default settings."""
        if tuning not in self._models:
            asked = self.config if tuning == self.config.tuning else self.config.model_copy(update={"tuning": tuning})
            self._models[tuning] = Model(asked, *self._place)
        return self._models[tuning]

    def need(self, setting: Setting) -> Need:
        """Bytes of rank 0, which has the most rows of every parameter."""
        model = self.model(setting.tuning)
        # fsdp2 cuts float32 weights where all of them are trained: they are the optimizer's masters.
        size = 4 if setting.tuning == "full" and setting.cut > 1 else model.dtype.itemsize
        frozen, trained = (rows_of_a_rank(p, setting.cut) for p in (model.frozen, model.trained))
        weights = frozen * model.dtype.itemsize + sum(b.nbytes for b in model.policy.buffers())
        gathered = _gathered(model, setting)
        if setting.in_4bit:
            weights -= (model.dtype.itemsize - _IN_4_BITS) * sum(p.numel() for p in model.in_4bit)
            gathered += model.dtype.itemsize * max(p.numel() for p in model.in_4bit)
        moments = _MOMENTS[self.config.optim]
        held = model.held(self.tree, setting.trees, checkpointing=setting.checkpointing)
        # DDP sums gradients in buffers of their size.
        gradients = 2 if setting.distributed == "ddp" and setting.ranks > 1 else 1
        return Need(
            weights=weights,
            trained=trained * size * (1 + gradients),
            optimizer=trained * (moments + (_MASTER if size < 4 else 0)),
            gathered=gathered,
            kept=held.kept,
            passing=held.peak - held.kept,
            checkpoint=trained * (4 + moments),
            host_copy=host_copy(model.trained, self.config.optim, setting.cut, pinned=True),
        )

    def remedy(self, setting: Setting, memory: float) -> str:
        """What makes a step fit, and the GiB that it takes then: the first change in the order of what they cost, or
        where no single one does, the first of them with all before it."""
        for changed in _changes(self.config, setting):
            need = self.need(changed)
            if need.fits(memory):
                return f"{', '.join(_in_words(setting, changed))} ({need.peak / 2**30:.1f} GiB)"
        return f"no setting: shorter rows than {self.tree.num_tokens:,} tokens, or a larger GPU"


def rows_of_a_rank(parameters: Sequence[torch.Tensor], cut: int) -> int:
    """Numbers in the rows of parameters that the first of `cut` ranks has, as fsdp2 cuts them."""
    return sum(math.ceil(p.shape[0] / cut) * math.prod(p.shape[1:]) if p.dim() else p.numel() for p in parameters)


def host_copy(trained: Sequence[torch.Tensor], optim: str, cut: int, *, pinned: bool) -> float:
    """Bytes that a copy of masters and moments takes on the host of the first of `cut` ranks."""
    masters = [4 * rows_of_a_rank([p], cut) for p in trained]
    return (1 + _MOMENTS[optim] / 4) * sum(map(pinned_bytes, masters) if pinned else masters)


def _gathered(model: Model, setting: Setting) -> int:
    """The root from forward to backward, the layer that computes and the one that is fetched; whole gradients of the
    root and of a layer, and a float32 copy of the layer's, which is summed over the ranks."""
    if setting.cut == 1:
        return 0
    (layer, layer_trained), (root, root_trained), size = model.layer, model.root, model.dtype.itemsize
    return size * (root + 2 * layer) + size * root_trained + (size + 4) * layer_trained


def _changes(config: TrainConfig, setting: Setting) -> Iterator[Setting]:
    single = list(_single_changes(config, setting))
    yield from (replace(setting, **change) for change in single)
    together: dict[str, Any] = {}
    for change in single:
        if not ("in_4bit" in change and together.get("distributed", setting.distributed) == "fsdp2"):
            together |= change
            yield replace(setting, **together)


def _single_changes(config: TrainConfig, setting: Setting) -> Iterator[dict[str, Any]]:
    if not setting.checkpointing:
        yield {"checkpointing": True}
    if setting.trees > 1:
        yield {"trees": 1}
    if not setting.in_4bit and not config.optim.endswith("bit") and not config.lora_target_parameters:
        more = [ranks for ranks in RANKS if ranks > setting.ranks]
        for ranks in ([] if setting.distributed == "fsdp2" or setting.ranks == 1 else [setting.ranks]) + more:
            yield {"distributed": "fsdp2", "ranks": ranks}
    if setting.tuning == "full":
        yield {"tuning": "lora"}
    if setting.distributed == "ddp" and not setting.in_4bit and not config.lora_target_parameters:
        yield {"tuning": "lora", "in_4bit": True}


def _in_words(setting: Setting, changed: Setting) -> Iterator[str]:
    """What the user writes to come from one to the other."""
    if changed.checkpointing != setting.checkpointing:
        yield "gradient_checkpointing = on"
    if changed.trees != setting.trees:
        yield "max_tokens_per_micro_batch = 0"
    if (changed.distributed, changed.ranks) != (setting.distributed, setting.ranks):
        more = f" on {changed.ranks} GPUs" if changed.ranks != setting.ranks else ""
        yield f"distributed = {changed.distributed}{more}"
    if changed.tuning != setting.tuning:
        yield f"tuning = {changed.tuning}"
    if changed.in_4bit != setting.in_4bit:
        yield "load_in_4bit = true"


def _counts(parameters: Sequence[torch.Tensor]) -> tuple[int, int]:
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
