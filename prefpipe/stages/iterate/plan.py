"""The steps of a round, with the links between them filled in. Pure: what rounds before it found comes as arguments."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from prefpipe.config.base import runtime_fields
from prefpipe.config.engine import EngineConfig
from prefpipe.config.iterate import FIXED, IterateConfig
from prefpipe.config.score import ScoreConfig

# What a step that scores has in common with the step that samples: how text becomes ids, and with every setting that
# cannot change a result what the machine is used for. Rows of a shard are prompts there and rows here.
_SHARED = (
    *("engine", "chat_template", "chat_template_kwargs", "template_changes", "thinking_marks", "dtype", "check"),
    *runtime_fields(EngineConfig),
)


@dataclass(frozen=True)
class Step:
    """One command of one round, in a folder of its name unless it has another."""

    round: int
    command: str
    config: BaseModel
    folder: str = ""

    @property
    def name(self) -> str:
        """Its folder inside OUT."""
        return f"round-{self.round}/{self.folder or self.command}"


@dataclass(frozen=True)
class Model:
    """A model by the settings that name it: directory or hub id, and adapter or none."""

    model: str
    adapter: str = "none"


@dataclass(frozen=True)
class Known:
    """What is known before a round: the best and the last round that were evaluated so far, how many prompts [generate]
    has, and whether this round is evaluated."""

    best: int = 0
    evaluated: int = 0
    num_prompts: int = 0
    evaluates: bool = True


def steps(config: IterateConfig, out: Path, number: int, known: Known) -> Iterator[Step]:
    """The steps of round `number`, in order. Round 0 is the evaluation of the policy before training.

    A round samples from the policy of the round before. Where sampling does not give the log-probs of its reference, a
    step scores the completions with it; rows of earlier rounds are scored with it as well.
    """
    if number > 0:
        yield from _training(config, out, number, known)
    if known.evaluates:
        yield evaluation(config, out, number, known)


def evaluation(config: IterateConfig, out: Path, number: int, known: Known) -> Step:
    """The step that evaluates the policy of a round."""
    policy = vars(trained(config, out, number))
    compared = {"baseline": baselines(config, out, number, known), "round": number}
    return Step(number, "evaluate", config.evaluate.model_copy(update={**policy, **compared}))


def baselines(config: IterateConfig, out: Path, number: int, known: Known) -> tuple[str, ...]:
    """What the evaluation of a round is compared with: the start, the best round so far and the one evaluated before,
    then what the table names."""
    earlier = dict.fromkeys((0, known.best, known.evaluated)) if number else ()
    return (*(str(out / f"round-{n}" / "evaluate") for n in earlier), *config.evaluate.baseline)


def leaves_engine(config: IterateConfig) -> bool:
    """Whether an evaluation has its engine as the last one: judges, further rewards and other policies come behind it,
    and need its memory."""
    table = config.evaluate
    return len(table.reward) == 1 and not table.judge and set(table.kl_to) <= {"base"}


def trained(config: IterateConfig, out: Path, number: int) -> Model:
    """The policy that a round has trained: an adapter on the model or, with full fine-tuning, a model."""
    if number == 0:
        return Model(config.model)
    folder = out / f"round-{number}" / "train"
    if config.train.tuning == "full":
        return Model(str(folder / "model"))
    return Model(config.model, str(folder / "adapter"))


def reference(config: IterateConfig, out: Path, number: int, best: int) -> Model:
    """The reference model of a round."""
    if config.reference.startswith(FIXED):
        path = Path(config.reference.removeprefix(FIXED))
        is_adapter = (path / "adapter_config.json").exists()
        return Model(config.model, str(path)) if is_adapter else Model(str(path))
    before = {"previous": number - 1, "base": 0, "best": best}[config.reference]
    return trained(config, out, before)


def _training(config: IterateConfig, out: Path, number: int, known: Known) -> Iterator[Step]:
    here = out / f"round-{number}"
    sampler, ref = trained(config, out, number - 1), reference(config, out, number, known.best)
    captured = _captured(config, sampler, ref)
    sampling = {
        **vars(sampler),
        "reference": captured,
        "seed": config.generate.seed + number,
        **_part(config, number, known.num_prompts),
        **config.scheduled("generate", number),
    }
    yield Step(number, "generate", config.generate.model_copy(update=sampling))
    completions = (str(here / "generate"),)
    scored: tuple[str, ...] = ()
    if captured == "none":
        yield Step(number, "score", _scoring(config, ref, completions, number))
        scored = (str(here / "score"),)
    building = {"completions": completions, "ref_logps": scored, **config.scheduled("build_pairs", number)}
    yield Step(number, "build-pairs", config.build_pairs.model_copy(update=building))
    rows = (str(here / "build-pairs"),)
    oldest = max(1, number - config.replay_rounds) if config.replay_rounds else 1
    earlier = tuple(str(out / f"round-{before}" / "build-pairs") for before in range(oldest, number))
    if earlier and config.replay:
        if config.replay == 1 and (config.reference not in ("previous", "best") or not config.needs_reference):
            rows += earlier
        else:
            yield Step(number, "score", _scoring(config, ref, earlier, number, config.replay), "replay")
            rows += (str(here / "replay"),)
    yield Step(number, "train", config.train.model_copy(update=_links(config, out, number, ref, rows)))


def _captured(config: IterateConfig, sampler: Model, ref: Model) -> str:
    """The reference whose log-probs sampling gives; none where they take a step of their own."""
    if config.reference == "base" and config.train.tuning == "lora":
        return "base"
    if ref == sampler or not config.needs_reference:
        return "policy"
    return "base" if ref == Model(sampler.model) else "none"


def _links(config: IterateConfig, out: Path, number: int, ref: Model, rows: Sequence[str]) -> dict[str, Any]:
    """The settings of train that link it: its start, its rows, its optimizer, and a reference that it does not load
    anyway."""
    start = trained(config, out, number - 1 if config.start == "previous" else 0)
    named: dict[str, str] = {}
    if config.needs_reference and ref not in (start, Model(start.model)):
        model = "policy" if ref.model == start.model else ref.model
        named = {"reference_model": model, "reference_adapter": ref.adapter}
    if config.optimizer == "continue" and number > 1:
        named["optimizer_from"] = str(out / f"round-{number - 1}" / "train")
    return {
        **vars(start),
        config.build_pairs.output: tuple(rows),
        **named,
        "seed": config.train.seed + number,
        **config.scheduled("train", number),
    }


def _scoring(config: IterateConfig, ref: Model, inputs: Sequence[str], number: int, share: float = 1.0) -> ScoreConfig:
    """A step that computes log-probs of the reference for rows that exist; for a share of them where less than all are
    asked for."""
    table = config.generate
    return ScoreConfig.model_validate(
        {
            **{name: getattr(table, name) for name in _SHARED},
            **vars(ref),
            "inputs": tuple(inputs),
            "reference": "policy" if config.needs_reference else "none",
            "max_length": table.max_prompt_tokens + table.max_tokens,
            "seed": table.seed + number,
            "share": share,
        }
    )


def _part(config: IterateConfig, number: int, num_prompts: int) -> dict[str, Any]:
    """The prompts of a round: every N-th of the first N * prompts_per_round, so that no two of N rounds share one, and
    a run with more rounds has the same first ones."""
    if not config.prompts_per_round:
        return {}
    parts = num_prompts // config.prompts_per_round
    return {"limit": parts * config.prompts_per_round, "part": f"{(number - 1) % parts + 1}/{parts}"}
