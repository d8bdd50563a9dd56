"""What every experiment consists of: its question, its arms, and a folder in which commands of prefpipe run."""

import importlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import addition

from prefpipe.cli import STAGES
from prefpipe.errors import PrefpipeError

REWARD = "addition:closeness"
ENGINE = {"engine": "transformers", "dtype": "float32", "max_num_seqs": 2048}
SAMPLING = {**ENGINE, "max_tokens": 5, "max_prompt_tokens": 16, "shard_rows": 512}
TRAINING = {
    "tuning": "full", "dtype": "float32", "train_batch_size": 16, "num_train_epochs": 2, "save_steps": 10_000,
    "max_tokens_per_micro_batch": 2048,
}  # fmt: skip
RIGHT_WRONG = {"reward": REWARD, "rule": "correct-wrong", "correct_reward": 0.95, "gap_filter": "none"}
ONE_NAT = {"loss_type": ["sigmoid"], "beta": 1.0, "learning_rate": 3e-4}
NLL = {"loss_type": ["sigmoid", "nll"], "loss_weights": [1.0, 1.0]}


@dataclass(frozen=True)
class Scale:
    """How large the experiments are.

    right: share of the sampled answers of the start that are right
    prompts, held_out: prompts to train on, and to evaluate on
    trials: learning rates that are tried for each loss
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    right: float = 0.4
    prompts: int = 150
    held_out: int = 150
    rounds: int = 3
    trials: int = 2


QUICK = Scale(seeds=(0,), right=0.08, prompts=40, held_out=10, rounds=2, trials=1)


@dataclass
class Arm:
    """One line of a table: the evaluation of a policy for each seed, or the message of the step that failed."""

    name: str
    settings: str = ""
    evaluations: dict[int, Path] = field(default_factory=dict[int, Path])
    failures: dict[int, str] = field(default_factory=dict[int, str])


class Hypothesis(NamedTuple):
    """That a measure of `arm` is above that of `other` (sign 1), below it (-1), or not told apart from it (0)."""

    measure: str
    arm: str
    sign: int
    other: str
    why: str


class Bench:
    """The folder of an experiment: the commands that run in it, and the policies that every experiment starts from."""

    def __init__(self, out: Path, name: str, scale: Scale) -> None:
        self.out, self.scale, self._shared = out / name, scale, out
        self.out.mkdir(parents=True, exist_ok=True)
        counts = {"train": scale.prompts, "validation": scale.held_out, "heldout": scale.held_out}
        self._prompts = addition.write_prompts(out / "prompts.jsonl", counts)
        self._arms: dict[str, Arm] = {}

    @property
    def arms(self) -> list[Arm]:
        """The lines of the table so far."""
        return list(self._arms.values())

    @contextmanager
    def arm(self, name: str, seed: int, settings: str = "") -> Generator[dict[int, Path]]:
        """The evaluations of an arm by seed; the caller adds that of `seed`. An error of a step is kept as its message,
        and the experiment goes on."""
        arm = self._arms.setdefault(name, Arm(name, settings))
        try:
            yield arm.evaluations
        except PrefpipeError as error:
            arm.failures[seed] = str(error)

    def start(self, seed: int) -> Path:
        """The policy before training."""
        return addition.teach(self._shared / f"start-{self.scale.right}-{seed}", seed, self.scale.right)

    def evaluated_start(self, seed: int) -> Path:
        """The policy before training, with its evaluation as an arm."""
        start = self.start(seed)
        with self.arm("start", seed) as evaluations:
            evaluations[seed] = self.evaluate(f"seed-{seed}/start-evaluate", start, seed)
        return start

    def step(self, command: str, name: str, **settings: Any) -> Path:
        """Run a command in a folder of this name; the run directory. Raises what the command raises."""
        config_class, module = STAGES[command]
        print(f"  {self.out.name}/{name}", flush=True)
        importlib.import_module(module).run(config_class.model_validate(settings), self.out / name, force=False)
        return self.out / name

    def generate(self, name: str, model: Path, seed: int) -> str:
        """Sample eight answers to every training prompt, with their log-probs; the run directory."""
        rows = {"prompts": str(self._prompts), "limit": self.scale.prompts, "num_samples": 8, "seed": seed}
        return str(self.step("generate", name, model=str(model), rewards=[REWARD], check=0, **rows, **SAMPLING))

    def train(self, name: str, model: Path, **settings: Any) -> Path:
        """Train a model; the directory of the new one."""
        return self.step("train", name, model=str(model), **{**TRAINING, **settings}) / "model"

    def evaluate(self, name: str, model: Path, seed: int, split: str = "heldout") -> Path:
        """A greedy and two sampled answers to the prompts of a split; of held-out ones also the KL to the start."""
        rows = {"prompts": str(self._prompts), "split": split, "limit": self.scale.held_out}
        rows |= {"kl_to": [str(self.start(seed))]} if split == "heldout" else {}
        return self.step("evaluate", name, model=str(model), reward=[REWARD], **rows, **SAMPLING)


@dataclass(frozen=True)
class Experiment:
    """A question with the function that runs its arms, what is expected, and the measures that its table shows.

    The docstring of `run` stands on the page of the experiment.
    """

    title: str
    run: Callable[[Bench], None]
    hypotheses: tuple[Hypothesis, ...]
    measures: tuple[str, ...] = ("sampled", "greedy", "kl")
