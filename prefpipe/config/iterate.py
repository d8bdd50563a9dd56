"""Settings of `prefpipe iterate`: how rounds are linked, when they stop, and one table per stage."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from prefpipe.config import shared
from prefpipe.config.base import ADDED, PATH, RUNTIME, Config
from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.generate import GenerateConfig
from prefpipe.config.stops import StopSettings
from prefpipe.config.train import TrainConfig

# Table -> settings that `iterate` fills in itself, since they link the stages.
_LINKS = {
    "generate": ("model", "adapter", "reference"),
    "build_pairs": ("completions", "reward_runs", "ref_logps", "policy_logps"),
    "train": (
        *("model", "adapter", "pairs", "labels", "groups", "ref_logps", "reference_model", "reference_adapter"),
        "optimizer_from",
    ),
    "evaluate": ("model", "adapter", "round"),
}
FIXED = "fixed:"
# Schedule -> the settings that take its values.
SCHEDULES = {
    "learning_rates": (("train", "learning_rate"),),
    "betas": (("train", "beta"), ("build_pairs", "beta")),
    "temperatures": (("generate", "temperature"),),
}
Metric = Literal["greedy.pass", "sampled.pass", "greedy.mean_reward", "sampled.mean_reward"]


class IterateConfig(Config):
    """Rounds of generate, build-pairs, train and evaluate, until the last one or until a rule says stop."""

    model: shared.Model = shared.DEFAULT_MODEL
    rounds: Annotated[int, RUNTIME, Field(ge=1)] = 2
    """Rounds after the evaluation of the policy before training. With more of them a finished run goes on."""
    reference: Annotated[str, Field(pattern=rf"^(previous|base|best|{FIXED}\S+)$")] = "previous"
    """Reference model of a round: the policy that samples (previous), whose log-probs come with its samples at no cost;
    the base model (base: the policy with its adapter off); the best round so far (best); or the adapter or model in a
    directory (fixed:PATH). Log-probs that sampling does not give are computed in a step of their own."""
    start: Annotated[Literal["previous", "base"], ADDED] = "previous"
    """What a round trains: the policy of the round before, or the base model anew, which goes with replay = 1: on the
    pairs of all rounds."""
    optimizer: Annotated[Literal["fresh", "continue"], ADDED] = "fresh"
    """Optimizer that a round begins with: a new one (fresh), or that of the round before, with its moments and step
    counts (continue). A new Adam follows signs of gradients in its first steps, and small rounds have few others."""
    replay: Annotated[float, ADDED, Field(ge=0, le=1)] = 0.0
    """Share of the rows of every earlier round that a round trains on too, drawn anew by the round; their log-probs are
    computed again where the reference is another one by now."""
    replay_rounds: Annotated[int, ADDED, Field(ge=0)] = 0
    """With replay: so many rounds before it, the newest ones, give rows to a round; 0: all of them."""
    prompts_per_round: Annotated[int, ADDED, Field(ge=0)] = 0
    """Prompts of a round, which no other round has; 0 gives every round all of them."""
    repeat_prompts: Annotated[bool, ADDED] = False
    """With prompts_per_round: when every prompt had its turn, deal the same prompts again, for new samples. Without it
    too few prompts for the rounds are an error."""
    learning_rates: Annotated[tuple[Annotated[float, Field(gt=0)], ...], ADDED] = ()
    """Learning rate of each round in place of train.learning_rate; rounds after the last one keep the last value."""
    betas: Annotated[tuple[Annotated[float, Field(gt=0)], ...], ADDED] = ()
    """The same for beta of train and build_pairs."""
    temperatures: Annotated[tuple[Annotated[float, Field(ge=0, le=2)], ...], ADDED] = ()
    """The same for generate.temperature."""
    metric_for_best_round: Annotated[Metric, ADDED] = "sampled.pass"
    """What decides which round is the best, and what it gains: a share that passes, or a mean reward, of the greedy or
    the sampled answers. Of equal rounds the earlier one is the best."""
    evaluate_every: Annotated[int, ADDED, Field(ge=1)] = 1
    """Rounds from one evaluation to the next; the policy before training and that of the last round have one in any
    case. Only rounds that were evaluated can be the best, and rules look at these."""
    from_run: Annotated[str, PATH] = ""
    """Directory of another run of iterate: its rounds up to from_round are linked into OUT, and rounds go on behind
    them with the settings of this one."""
    from_round: Annotated[int, ADDED, Field(ge=0)] = 0
    """Last round that is taken from from_run; 0 takes its evaluation before training."""
    launcher: Annotated[str, RUNTIME, Field(min_length=1)] = "auto"
    """What starts train: auto (one process per visible GPU), none (one process), or a command in front of it that
    names the ranks, such as 'torchrun --nproc_per_node 4', or srun in front of torchrun."""
    keep_engine: Annotated[Literal["auto", "always", "never"], ADDED, RUNTIME] = "auto"
    """Whether one engine stays open through all rounds, while other steps run, and takes the adapter of every round:
    auto (where no GPU is visible and the model is small beside the free memory), always, never. Training needs the
    memory of a GPU: with always, generate and evaluate must leave it some (gpu_memory_utilization)."""
    stop: StopSettings = StopSettings()
    report: Annotated[bool, ADDED, RUNTIME] = False
    """Write OUT/report.html after every evaluation, so that the rounds can be watched."""
    generate: GenerateConfig = GenerateConfig()
    build_pairs: BuildPairsConfig = BuildPairsConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @property
    def needs_reference(self) -> bool:
        """Whether a loss reads log-probs of the reference."""
        return self.train.objective.needs("reference")

    def scheduled(self, table: str, number: int) -> dict[str, Any]:
        """The settings of a table that a schedule changes from round to round, with their values in round `number`."""
        found: dict[str, Any] = {}
        for schedule, places in SCHEDULES.items():
            values = getattr(self, schedule)
            if values:
                value = values[min(number, len(values)) - 1]
                found |= {name: value for where, name in places if where == table and self._is_read(table, name)}
        return found

    def _is_read(self, table: str, name: str) -> bool:
        return (table, name) != ("build_pairs", "beta") or self.build_pairs.output == "pairs"

    @model_validator(mode="after")
    def _tables_leave_links_alone(self) -> "IterateConfig":
        for table, names in _LINKS.items():
            changed = [name for name in names if self._is_set(table, name)]
            if changed:
                raise ValueError(f"iterate links the stages itself: remove {', '.join(changed)} from [{table}]")
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> "IterateConfig":
        kind = self.train.objective.kind
        if kind != self.build_pairs.output:
            raise ValueError(f'loss {self.train.loss_type[0]} trains on {kind}: set output = "{kind}" in [build_pairs]')
        if self.build_pairs.format != "prefpipe":
            raise ValueError(f"format = {self.build_pairs.format} in [build_pairs] is for TRL: leave it out")
        problems = [*self._schedule_misfits(), *self._round_misfits()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _schedule_misfits(self) -> Iterator[str]:
        for schedule, places in SCHEDULES.items():
            values = getattr(self, schedule)
            if not values:
                continue
            yield from (
                f"{schedule} sets {t}.{n} in every round: leave it out" for t, n in places if self._is_set(t, n)
            )
            for table, name in places:
                if self._is_read(table, name):
                    yield from self._refused(schedule, table, name, values)

    def _refused(self, schedule: str, table: str, name: str, values: tuple[float, ...]) -> Iterator[str]:
        """The error of a table's class for a value of a schedule; only that class knows which values go together."""
        settings = getattr(self, table)
        for value in values:
            try:
                type(settings).model_validate({**dict(settings), name: value})
            except ValidationError as error:
                yield f"{schedule}: {error.errors()[0]['msg'].removeprefix('Value error, ')}"
                return

    def _round_misfits(self) -> Iterator[str]:
        if self.reference not in ("previous", "base") and not self.needs_reference:
            yield f"reference = {self.reference} is read by none of {', '.join(self.train.loss_type)}"
        if self.prompts_per_round and self.generate.part != "1/1":
            yield f"prompts_per_round cuts the prompts itself: leave out part = {self.generate.part} in [generate]"
        if self.optimizer == "continue" and self.start == "base":
            yield "optimizer = continue goes on where the round before ended, and start = base does not: leave out one"
        if self.repeat_prompts and not self.prompts_per_round:
            yield "repeat_prompts is read with prompts_per_round: without it every round has all prompts"
        if self.replay_rounds and not self.replay:
            yield f"replay_rounds = {self.replay_rounds} is read with replay: say which share of their rows"
        if self.from_round and not self.from_run:
            yield f"from_round = {self.from_round} is a round of from_run: name its directory"
        if self.from_run and self.from_round >= self.rounds:
            yield f"rounds = {self.rounds} ends before the first round behind from_round = {self.from_round}"

    def _is_set(self, table: str, name: str) -> bool:
        settings = getattr(self, table)
        return getattr(settings, name) != type(settings).model_fields[name].default
