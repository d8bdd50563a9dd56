"""Pairs for training tests: random token ids with reference log-probs of a real tiny model, as a run on disk."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.config.train import TrainConfig
from prefpipe.forward import load
from prefpipe.forward.layout import Tree
from prefpipe.forward.logps import TreeModel, score
from prefpipe.ids import content_id, ids_digest
from prefpipe.models.policy import resolve
from prefpipe.runs import store
from prefpipe.schemas import KlBank, Label, Pair, RankedGroup, to_table
from prefpipe.stages.train import parallel, stage
from prefpipe.stages.train.examples import TrainPair
from prefpipe.stages.train.loop import Trainer
from prefpipe.stages.train.optimizer import MasterOptimizer
from prefpipe.stages.train.parallel import World

EOS = 2


def bare_pairs(count: int, *, num_prompts: int = 5, seed: int = 0) -> list[Pair]:
    """Pairs without reference; chosen ends with EOS and uses low ids, rejected uses high ones, so there is a lesson."""
    generator = random.Random(seed)

    def draw(low: int, high: int, ids: tuple[int, int]) -> list[int]:
        return [generator.randrange(*ids) for _ in range(generator.randint(low, high))]

    prompts = [draw(4, 12, (3, 260)) for _ in range(num_prompts)]
    rows: list[Pair] = []
    for number in range(count):
        prompt = prompts[number % num_prompts]
        chosen, rejected = [*draw(2, 10, (3, 100)), EOS], draw(2, 10, (160, 260))
        keys = [content_id(prompt, ids, number) for ids in (chosen, rejected)]
        rows.append(
            Pair(
                pair_id=content_id(*keys), prompt_id=content_id(prompt), chosen_completion_id=keys[0],
                rejected_completion_id=keys[1], prompt=[{"role": "user", "content": "?"}],
                chosen=[{"role": "assistant", "content": "!"}], rejected=[{"role": "assistant", "content": "."}],
                prompt_token_ids=prompt, chosen_token_ids=chosen, rejected_token_ids=rejected,
                chosen_ids_digest=ids_digest(prompt, chosen), rejected_ids_digest=ids_digest(prompt, rejected),
                chosen_reward=1.0, rejected_reward=0.0, reward_gap=1.0, preference_prob=None,
                chosen_finish_reason="stop", rejected_finish_reason="length", weight=1.0, ref_chosen_logps=None,
                ref_rejected_logps=None, ref_chosen_token_logps=None, ref_rejected_token_logps=None, reference=None,
                scorer=None,
            )
        )  # fmt: skip
    return rows


def with_reference(
    rows: Sequence[Pair], model_directory: Path, *, adapter: Path | None = None, dtype: str = "float32"
) -> list[Pair]:
    """The same pairs with log-probs of a model, with or without an adapter, as `prefpipe generate` records them."""
    policy = resolve(str(model_directory), str(adapter) if adapter else "none")
    model: torch.nn.Module = load.load_model(model_directory, dtype)
    if adapter is not None:
        model = load.load_adapter(model, adapter, trainable=False)  # type: ignore[arg-type]
    policy_model, found = TreeModel(model), list[Pair]()
    for row in rows:
        tree = Tree(row.prompt_token_ids, (row.chosen_token_ids, row.rejected_token_ids))
        ((chosen, rejected),) = score(policy_model, [tree])
        found.append(with_values(row, chosen, rejected, policy.id, load.scorer_name(dtype)))
    return found


def with_values(row: Pair, chosen: list[float], rejected: list[float], reference: str | None, scorer: str) -> Pair:
    """A pair with these token log-probs, and sums that go with them."""
    return replace(
        row, ref_chosen_token_logps=chosen, ref_rejected_token_logps=rejected, ref_chosen_logps=sum(chosen),
        ref_rejected_logps=sum(rejected), reference=reference, scorer=scorer,
    )  # fmt: skip


def write_pairs(out: Path, rows: list[Pair]) -> Path:
    """A complete run of build-pairs that holds these rows."""
    return write_run(out, pairs=rows)


def labels_of(rows: Sequence[Pair]) -> list[Label]:
    """The two completions of every pair as labels of their own, with the reference values that the pair has."""
    found: dict[str, Label] = {}
    for row in rows:
        for desirable, key, ids, values in (
            (True, row.chosen_completion_id, row.chosen_token_ids, row.ref_chosen_token_logps),
            (False, row.rejected_completion_id, row.rejected_token_ids, row.ref_rejected_token_logps),
        ):
            found[key] = Label(
                completion_id=key, prompt_id=row.prompt_id, prompt=row.prompt, completion=row.chosen, label=desirable,
                prompt_token_ids=row.prompt_token_ids, token_ids=ids, ids_digest=ids_digest(row.prompt_token_ids, ids),
                finish_reason="stop", reward=None, weight=row.weight, ref_token_logps=values,
                ref_logps=None if values is None else sum(values), reference=row.reference, scorer=row.scorer,
            )  # fmt: skip
    return list(found.values())


def groups_of(rows: Sequence[Pair]) -> list[RankedGroup]:
    """A group per prompt: all chosen completions before all rejected ones, no reference values."""
    by_prompt: dict[str, list[Pair]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt_id, []).append(row)
    found: list[RankedGroup] = []
    for key, own in by_prompt.items():
        ids = [p.chosen_token_ids for p in own] + [p.rejected_token_ids for p in own]
        keys = [p.chosen_completion_id for p in own] + [p.rejected_completion_id for p in own]
        prompt = own[0].prompt_token_ids
        found.append(
            RankedGroup(
                prompt_id=key, prompt=own[0].prompt, prompt_token_ids=prompt, completion_ids=keys,
                completions=[own[0].chosen] * len(ids), token_ids=ids, weight=1.0, reference=None, scorer=None,
                ids_digests=[ids_digest(prompt, i) for i in ids], rewards=[float(-i) for i in range(len(ids))],
                finish_reasons=["stop"] * len(ids), ref_logps=None, ref_token_logps=None,
            )
        )  # fmt: skip
    return found


def write_run(out: Path, **datasets: Sequence[object]) -> Path:
    """A complete run of build-pairs that holds these datasets, each under its name."""
    with store.open_run(out, "build-pairs", BuildPairsConfig(), {"test": content_id(str(out))}, force=False) as run:
        for name, rows in datasets.items():
            row_type = {"pairs": Pair, "labels": Label, "kl_bank": KlBank, "groups": RankedGroup}[name]
            run.write_part(name, row_type, 0, to_table(row_type, list(rows)))
        run.finish({name: len(rows) for name, rows in datasets.items()}, {})
    return out


def to_train_pairs(rows: Sequence[Pair]) -> list[TrainPair]:
    return [
        TrainPair(
            r.pair_id, r.chosen_completion_id, r.rejected_completion_id, tuple(r.prompt_token_ids),
            tuple(r.chosen_token_ids), tuple(r.rejected_token_ids), tuple(r.ref_chosen_token_logps or ()),
            tuple(r.ref_rejected_token_logps or ()), r.weight,
        )
        for r in rows
    ]  # fmt: skip


def config(model: Path, *pairs: Path, **changes: object) -> TrainConfig:
    """Settings for a few quick fp32 steps."""
    values: dict[str, object] = {
        "model": str(model), "pairs": tuple(map(str, pairs)), "dtype": "float32", "learning_rate": 3e-3,
        "train_batch_size": 4, "num_train_epochs": 2, "lora_r": 4, "lora_alpha": 8, "save_steps": 1,
    }  # fmt: skip
    return TrainConfig.model_validate({**values, **changes})


def train(model: Path, pairs: Path, out: Path) -> Path:
    """A complete run of `train` on four pairs, which are written to `pairs`."""
    stage.run(config(model, write_pairs(pairs, bare_pairs(4))), out, force=False)
    return out


def policy(model_directory: Path, dtype: str = "float32") -> TreeModel:
    """The base with a new adapter (B = 0, seed 0), as a run of `config` starts."""
    base = load.load_model(model_directory, dtype)
    return TreeModel(load.add_lora(base, r=4, alpha=8, target_modules="all-linear", seed=0))


def trainer(model: TreeModel, settings: TrainConfig) -> Trainer:
    """A trainer alone in the world; without a budget in the settings every step is one micro-batch."""
    world = World(0, 1)
    wrapped = parallel.wrap(model, world, settings.distributed)
    budget = settings.max_tokens_per_micro_batch or 10**9
    return Trainer(model, wrapped, MasterOptimizer(wrapped, settings.weight_decay), settings, world, budget)


def lora(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every trained weight."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def plain_logp(model: torch.nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    """The log-prob of a completion by transformers' forward on one row."""
    ids = torch.tensor([[*prompt, *completion]])
    logps = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    return logps.gather(1, torch.tensor(completion).unsqueeze(1)).sum()
