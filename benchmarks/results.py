"""What choices do to a policy, as experiments that run again by one command: reference, loss, rounds, pair rule.

    python benchmarks/results.py [references] [losses] [rounds] [pair-rules] [--quick] [--out DIR] [--docs DIR]

Every step is a command of prefpipe, called in this process; the same command again goes on where it was cut. The task
is `addition.py`. The hypotheses of an experiment stand in this file before it runs, as differences with a sign, and its
page says of each whether it held. An arm that fails stays in the table, with its message.
"""

import argparse
import importlib
import json
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import addition
import polars as pl

from prefpipe import statistics
from prefpipe.cli import STAGES
from prefpipe.errors import PrefpipeError
from prefpipe.statistics import Estimate

ROOT = Path(__file__).resolve().parent.parent
REWARD = "addition:closeness"
ENGINE = {"engine": "transformers", "dtype": "float32", "max_num_seqs": 2048}
SAMPLING = {**ENGINE, "max_tokens": 5, "max_prompt_tokens": 16, "shard_rows": 512}
TRAINING = {
    "tuning": "full", "dtype": "float32", "train_batch_size": 16, "num_train_epochs": 2, "save_steps": 10_000,
    "max_tokens_per_micro_batch": 2048,
}  # fmt: skip
RIGHT_WRONG = {"reward": REWARD, "rule": "correct-wrong", "correct_reward": 0.95, "gap_filter": "none"}
NLL = {"loss_type": ["sigmoid", "nll"], "loss_weights": [1.0, 1.0]}


@dataclass(frozen=True)
class Scale:
    """How large the experiments are. right: share of right answers, of those sampled, at the start; trials: learning
    rates among which each loss chooses."""

    seeds: tuple[int, ...] = (0, 1, 2)
    right: float = 0.4
    prompts: int = 150
    held_out: int = 150
    rounds: int = 3
    trials: int = 2


QUICK = Scale(seeds=(0,), right=0.08, prompts=40, held_out=10, rounds=2, trials=1)


@dataclass
class Arm:
    """One line of a table: a policy, as its evaluation for each seed, or the message of what failed."""

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
        """The evaluations of an arm, to put that of a seed in. What fails before is kept with its message."""
        arm = self._arms.setdefault(name, Arm(name, settings))
        try:
            yield arm.evaluations
        except PrefpipeError as error:
            arm.failures[seed] = str(error)

    def start(self, seed: int) -> Path:
        """The policy before training."""
        return addition.teach(self._shared / f"start-{self.scale.right}-{seed}", seed, self.scale.right)

    def step(self, command: str, name: str, **settings: Any) -> Path:
        """Run a command; its run directory. Raises what the command raises."""
        config_class, module = STAGES[command]
        print(f"  {self.out.name}/{name}", flush=True)
        importlib.import_module(module).run(config_class.model_validate(settings), self.out / name, force=False)
        return self.out / name

    def generate(self, name: str, model: Path, seed: int) -> str:
        """Eight answers to every prompt to train on, with log-probs of the policy that samples them."""
        rows = {"prompts": str(self._prompts), "limit": self.scale.prompts, "num_samples": 8, "seed": seed}
        return str(self.step("generate", name, model=str(model), rewards=[REWARD], check=0, **rows, **SAMPLING))

    def train(self, name: str, model: Path, **settings: Any) -> Path:
        """The model that training writes."""
        return self.step("train", name, model=str(model), **{**TRAINING, **settings}) / "model"

    def evaluate(self, name: str, model: Path, start: Path, split: str = "heldout") -> Path:
        """A greedy and two sampled answers to the prompts of a split; of held-out ones also the KL to the start."""
        rows = {"prompts": str(self._prompts), "split": split, "limit": self.scale.held_out}
        rows |= {"kl_to": [str(start)]} if split == "heldout" else {}
        return self.step("evaluate", name, model=str(model), reward=[REWARD], **rows, **SAMPLING)


# Result 1

ONE_NAT = {"loss_type": ["sigmoid"], "beta": 1.0, "learning_rate": 3e-4}


def references(bench: Bench) -> None:
    """DPO with beta 1 and learning rate 3e-4. Two policies learn from the same completions, one with the start as its
    reference in every round, one with the policy that the round starts from; each of the two samples the completions
    once. Log-probs of a reference are computed by `score`. The first round is the same for both."""
    for seed in bench.scale.seeds:
        start = bench.start(seed)
        completions = bench.generate(f"seed-{seed}/1-generate", start, seed)
        pairs = bench.step("build-pairs", f"seed-{seed}/1-pairs", completions=[completions], **RIGHT_WRONG)
        first = bench.train(f"seed-{seed}/1-train", start, pairs=[str(pairs)], seed=seed, **ONE_NAT)
        for line, model in (("start", start), ("round 1", first)):
            with bench.arm(line, seed) as evaluations:
                evaluations[seed] = bench.evaluate(f"seed-{seed}/{line.replace(' ', '-')}-evaluate", model, start)
        for sampler in ("previous", "fixed"):
            policies = {"previous": first, "fixed": first}
            for number in range(2, bench.scale.rounds + 1):
                if sampler in policies:
                    policies = _reference_round(bench, policies, sampler, seed, number)


def _reference_round(
    bench: Bench, policies: Mapping[str, Path], sampler: str, seed: int, number: int
) -> dict[str, Path]:
    """The policies after one more round on the completions of `sampler`, with log-probs of each reference."""
    start, folder = bench.start(seed), f"seed-{seed}/{number}-{sampler}-samples"
    completions = bench.generate(f"{folder}-generate", policies[sampler], seed + 10 * number)
    pairs = bench.step("build-pairs", f"{folder}-pairs", completions=[completions], seed=number, **RIGHT_WRONG)
    after: dict[str, Path] = {}
    for reference, policy in policies.items():
        here = f"{folder}-{reference}"
        model = {"previous": policy, "fixed": start}[reference]
        other = {"reference_model": str(start)} if reference == "fixed" else {}
        with bench.arm(f"round {number}, {sampler} samples, {reference} reference", seed) as evaluations:
            scored = bench.step("score", f"{here}-score", model=str(model), inputs=[str(pairs)], check=0, **ENGINE)
            rows = {"pairs": [str(scored)], "seed": seed + number}
            trained = bench.train(f"{here}-train", policy, **rows, **other, **ONE_NAT)
            evaluations[seed] = bench.evaluate(f"{here}-evaluate", trained, start)
            after[reference] = trained
    return after


REFERENCES = tuple(
    Hypothesis(measure, f"round {{last}}, {sampler} samples, fixed reference", -1,
               f"round {{last}}, {sampler} samples, previous reference", why)
    for sampler in ("previous", "fixed")
    for measure, why in (("kl", "the start holds the policy"), ("sampled", "what holds it lets it learn less"))
)  # fmt: skip


# Result 2

# Loss -> what it trains on, and its settings, with a beta that its unit makes sensible for answers of three tokens.
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "DPO": ("pairs", {"loss_type": ["sigmoid"], "beta": 1.0}),
    "DPO + NLL": ("pairs", {**NLL, "beta": 1.0}),
    "IPO": ("pairs", {"loss_type": ["ipo"], "beta": 0.25}),
    "KTO": ("labels", {"loss_type": ["kto"], "beta": 3.0, "train_batch_size": 2 * TRAINING["train_batch_size"]}),
    "SimPO": ("pairs", {"loss_type": ["simpo"], "beta": 2.0}),
    "ORPO": ("pairs", {"loss_type": ["orpo"], "beta": 0.3}),
}
RATES = (1e-4, 3e-4)


def losses(bench: Bench) -> None:
    """One round of each loss on the same completions in as many steps; KTO reads them as labels. Each loss has the
    better of two learning rates, by right answers of a fourth policy to prompts of the split `validation`; that policy
    and these prompts are in no line of the table."""
    tuned_on = max(bench.scale.seeds) + 1
    rows = _pairs_and_labels(bench, tuned_on)
    best: dict[str, float] = {}
    for loss in LOSSES:
        passed = {
            rate: _mean("sampled", [_with_loss(bench, loss, rate, tuned_on, rows, "validation")]).value
            for rate in RATES[: bench.scale.trials]
        }
        best[loss] = max(passed, key=lambda rate: passed[rate])
    for seed in bench.scale.seeds:
        start, rows = bench.start(seed), _pairs_and_labels(bench, seed)
        with bench.arm("start", seed) as evaluations:
            evaluations[seed] = bench.evaluate(f"seed-{seed}/start-evaluate", start, start)
        for loss, rate in best.items():
            with bench.arm(loss, seed, f"beta {LOSSES[loss][1]['beta']:g}, learning rate {rate:g}") as evaluations:
                evaluations[seed] = _with_loss(bench, loss, rate, seed, rows, "heldout")


def _pairs_and_labels(bench: Bench, seed: int) -> dict[str, str]:
    """The same completions as pairs and as labels."""
    completions = bench.generate(f"seed-{seed}/generate", bench.start(seed), seed)
    outputs = {"pairs": {}, "labels": {"output": "labels", "label_rule": "pairs"}}
    return {
        kind: str(bench.step("build-pairs", f"seed-{seed}/{kind}", completions=[completions], **RIGHT_WRONG, **output))
        for kind, output in outputs.items()
    }


def _with_loss(bench: Bench, loss: str, rate: float, seed: int, rows: Mapping[str, str], split: str) -> Path:
    kind, settings = LOSSES[loss]
    here = f"seed-{seed}/{loss.replace(' ', '')}-{rate:g}"
    data = {kind: [rows[kind]], "seed": seed, "learning_rate": rate}
    model = bench.train(f"{here}-train", bench.start(seed), **settings, **data)
    return bench.evaluate(f"{here}-{split}", model, bench.start(seed), split)


LOSS_HYPOTHESES = (
    *(Hypothesis("sampled", loss, 1, "start", "one round helps with any loss") for loss in LOSSES),
    Hypothesis("sampled", "DPO + NLL", 1, "DPO", "the chosen side cannot fall"),
    *(Hypothesis("sampled", loss, 0, "DPO", "data move more than the loss does") for loss in ("IPO", "KTO", "ORPO")),
)


# Result 3

# Arm -> settings of train and of build-pairs. The reward of the flipped labels is the negative one.
ROUND_ARMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "DPO": ({"loss_type": ["sigmoid"]}, {}),
    "DPO + NLL": (NLL, {}),
    "DPO + NLL, flipped labels": (NLL, {"reward": f"-1*{REWARD}", "correct_reward": -0.95}),
}


def rounds(bench: Bench) -> None:
    """Rounds on pairs of a right and a wrong answer, each with the policy that samples as its reference; learning rate
    3e-4, and beta 0.1, which is TRL's default and asks answers of three tokens for ten nats."""
    for seed in bench.scale.seeds:
        start = bench.start(seed)
        with bench.arm("start", seed) as evaluations:
            evaluations[seed] = bench.evaluate(f"seed-{seed}/start-evaluate", start, start)
        first = bench.generate(f"seed-{seed}/1-generate", start, seed)
        for name, (loss, labels) in ROUND_ARMS.items():
            policy, slug = start, name.replace(" ", "").replace(",", "-")
            for number in range(1, bench.scale.rounds + 1):
                here = f"seed-{seed}/{number}-{slug}"
                with bench.arm(f"round {number}, {name}", seed) as evaluations:
                    samples = first if number == 1 else bench.generate(f"{here}-generate", policy, seed + 10 * number)
                    pairs = bench.step(
                        "build-pairs", f"{here}-pairs", completions=[samples], seed=number, **{**RIGHT_WRONG, **labels}
                    )
                    rows = {"pairs": [str(pairs)], "seed": seed + number, "beta": 0.1, "learning_rate": 3e-4}
                    policy = bench.train(f"{here}-train", policy, **rows, **loss)
                    evaluations[seed] = bench.evaluate(f"{here}-evaluate", policy, start)
                if seed not in evaluations:
                    break  # without this round there is no next one


ROUND_HYPOTHESES = (
    Hypothesis("sampled", "round {last}, DPO + NLL", 1, "start", "right answers get likelier"),
    Hypothesis("sampled", "round {last}, DPO + NLL", 1, "round {last}, DPO", "at beta 0.1 DPO displaces right answers"),
    Hypothesis("sampled", "round {last}, DPO + NLL, flipped labels", -1, "start", "the control: it is the labels"),
)


# Result 4

RULES: dict[str, dict[str, Any]] = {
    "best-worst": {},
    "best-random-worse": {},
    "all-above-gap": {"rule_gap": 0.3, "pairs_per_prompt": 0},
}


def pair_rules(bench: Bench) -> None:
    """One round of DPO with beta 1 and learning rate 3e-4, on as many pairs by each rule: drawn from those that it
    makes of the same completions. The reward is how close the number is, in tenths; all-above-gap takes gaps from
    0.3 on."""
    for seed in bench.scale.seeds:
        start = bench.start(seed)
        with bench.arm("start", seed) as evaluations:
            evaluations[seed] = bench.evaluate(f"seed-{seed}/start-evaluate", start, start)
        completions = bench.generate(f"seed-{seed}/generate", start, seed)
        files = _equal_pairs(bench, completions, seed)
        for rule, file in files.items():
            with bench.arm(rule, seed) as evaluations:
                model = bench.train(f"seed-{seed}/{rule}-train", start, pairs=[str(file)], seed=seed, **ONE_NAT)
                evaluations[seed] = bench.evaluate(f"seed-{seed}/{rule}-evaluate", model, start)


def _equal_pairs(bench: Bench, completions: str, seed: int) -> dict[str, Path]:
    """A file of pairs for each rule, with as many rows as the rule with the fewest has."""
    drawn: dict[str, pl.DataFrame] = {}
    for rule, settings in RULES.items():
        run = bench.step(
            "build-pairs", f"seed-{seed}/{rule}", completions=[completions], reward=REWARD, rule=rule, seed=seed,
            gap_filter="none", format="trl", **settings,
        )  # fmt: skip
        drawn[rule] = pl.read_parquet(run / "trl" / "*.parquet", columns=["prompt", "chosen", "rejected"])
    count = min(map(len, drawn.values()))
    files = {rule: bench.out / f"seed-{seed}" / f"{rule}.jsonl" for rule in drawn}
    for rule, pairs in drawn.items():
        pairs.sample(count, seed=seed, shuffle=True).write_ndjson(files[rule])
    return files


RULE_HYPOTHESES = (
    *(Hypothesis("closeness", rule, 1, "start", "any rule helps") for rule in RULES),
    Hypothesis("kl", "best-worst", 1, "best-random-worse", "extremes exaggerate the reward: the policy goes further"),
    Hypothesis("closeness", "best-worst", 0, "best-random-worse", "this reward has no noise to exaggerate"),
    Hypothesis("closeness", "all-above-gap", 0, "best-random-worse", "as many pairs teach as much"),
)


# What the answers say


def _values(measure: str, evaluation: Path) -> dict[str, list[float]]:
    """The values of a measure by prompt."""
    rows = pl.read_parquet(evaluation / "evaluations" / "*.parquet").filter(
        pl.col("decoding") == ("greedy" if measure == "greedy" else "sampled")
    )
    if measure == "kl":
        parts = sorted(evaluation.glob("kl/*/*.parquet"))
        theirs = {
            c: v for part in parts for c, v in pl.read_parquet(part).select("completion_id", "token_logps").rows()
        }
        found = [
            statistics.kl_estimates(ours, theirs[key])[1] if theirs else 0.0
            for key, ours in rows.select("completion_id", "token_logps").rows()
        ]
    else:
        rewards = [reward or 0.0 for reward in rows["reward"]]
        found = rewards if measure == "closeness" else [float(reward >= 1) for reward in rewards]
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for prompt, value in zip(rows["prompt_id"], found, strict=True):
        by_prompt[prompt].append(value)
    return by_prompt


def _mean(measure: str, evaluations: Sequence[Path]) -> Estimate:
    """A measure over the prompts of all seeds, with the interval that evaluate has for it."""
    groups = [group for evaluation in evaluations for group in _values(measure, evaluation).values()]
    return statistics.share(groups) if measure in ("sampled", "greedy") else statistics.mean(groups)


def _difference(measure: str, pairs: Sequence[tuple[Path, Path]]) -> Estimate:
    """The mean difference of two arms, paired by seed and prompt."""
    found: list[float] = []
    for ours, theirs in ((_values(measure, a), _values(measure, b)) for a, b in pairs):
        found += [sum(ours[p]) / len(ours[p]) - sum(theirs[p]) / len(theirs[p]) for p in ours]
    return statistics.mean([[d] for d in found]) if measure == "kl" else statistics.paired(found)


def judged(hypothesis: Hypothesis, arms: Mapping[str, Arm]) -> dict[str, Any]:
    """The difference that a hypothesis is about, over all seeds and for each, and whether it held."""
    ours, theirs = arms.get(hypothesis.arm), arms.get(hypothesis.other)
    seeds = sorted(set(ours.evaluations) & set(theirs.evaluations)) if ours and theirs else []
    if not ours or not theirs or not seeds:
        return {**hypothesis._asdict(), "outcome": "not measured"}
    pairs = {seed: (ours.evaluations[seed], theirs.evaluations[seed]) for seed in seeds}
    difference = _difference(hypothesis.measure, list(pairs.values()))
    return {
        **hypothesis._asdict(),
        **difference.named("difference"),
        "seeds": {seed: _difference(hypothesis.measure, [pair]).value for seed, pair in pairs.items()},
        "outcome": outcome(hypothesis.sign, difference),
    }


def outcome(sign: int, difference: Estimate) -> str:
    """What the interval of a difference says about the sign that was expected."""
    found = (difference.low > 0) - (difference.high < 0)
    if sign == 0:
        return "a difference" if found else "none shown"
    return "held" if found == sign else "the opposite" if found else "not shown"


# Pages


@dataclass(frozen=True)
class Experiment:
    """A question, how it is asked, what is expected, and what the table shows."""

    title: str
    run: Callable[[Bench], None]
    hypotheses: tuple[Hypothesis, ...]
    measures: tuple[str, ...] = ("sampled", "greedy", "kl")


EXPERIMENTS = {
    "references": Experiment("A fixed reference or the previous policy, on equal data", references, REFERENCES),
    "losses": Experiment("Six losses on the same completions", losses, LOSS_HYPOTHESES),
    "rounds": Experiment("Rounds with a verifier, with and without NLL", rounds, ROUND_HYPOTHESES),
    "pair-rules": Experiment(
        "Pair rules at n = 8, on as many pairs", pair_rules, RULE_HYPOTHESES, ("closeness", "sampled", "kl")
    ),
}  # fmt: skip
WORDS = {
    "sampled": "right, sampled", "greedy": "right, greedy", "closeness": "closeness, sampled", "kl": "KL to the start",
}  # fmt: skip
SIGNS = {1: "above", -1: "below", 0: "no different from"}


def report(name: str, scale: Scale, arms: Sequence[Arm], seconds: float) -> dict[str, Any]:
    """The numbers of an experiment."""
    experiment, by_name = EXPERIMENTS[name], {arm.name: arm for arm in arms}
    hypotheses = [
        h._replace(arm=h.arm.format(last=scale.rounds), other=h.other.format(last=scale.rounds))
        for h in experiment.hypotheses
    ]
    return {
        "name": name,
        "title": experiment.title,
        "command": _command(name, scale),
        "commit": _commit(),
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "cpu_seconds": round(seconds),
        "scale": asdict(scale),
        "arms": [_line(arm, experiment.measures) for arm in arms],
        "hypotheses": [judged(hypothesis, by_name) for hypothesis in hypotheses],
    }


def _line(arm: Arm, measures: Sequence[str]) -> dict[str, Any]:
    found = {
        measure: {
            **_mean(measure, list(arm.evaluations.values()))._asdict(),
            "seeds": {seed: _mean(measure, [evaluation]).value for seed, evaluation in arm.evaluations.items()},
        }
        for measure in measures
        if arm.evaluations
    }
    return {"name": arm.name, "settings": arm.settings, "failures": arm.failures, **found}


def _command(name: str, scale: Scale) -> str:
    usual = QUICK if scale.prompts == QUICK.prompts else Scale()
    seeds = f" --seeds {' '.join(map(str, scale.seeds))}" if scale.seeds != usual.seeds else ""
    return f"python benchmarks/results.py {name}{' --quick' if usual == QUICK else ''}{seeds}"


def _commit() -> str:
    """The commit of the code, with a mark where it differs from it."""

    def git(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)

    changed = git("diff", "--quiet", "HEAD", "--", "prefpipe", "benchmarks").returncode
    return git("rev-parse", "HEAD").stdout.strip() + (" with changes" if changed else "")


def page(found: Mapping[str, Any]) -> str:
    """The numbers as Markdown."""
    experiment, scale = EXPERIMENTS[found["name"]], found["scale"]
    head = [WORDS[measure] for measure in experiment.measures]
    settings = any(line["settings"] for line in found["arms"])
    expected = [
        f"| {WORDS[h['measure']]}: {h['arm']} {SIGNS[h['sign']]} {h['other']} | {h['why']} | "
        + (
            f"{_cell(h['measure'], h, 'difference', signed=True)} | {_each(h['measure'], h, signed=True)}"
            if "seeds" in h
            else " | "
        )
        + f" | {h['outcome']} |"
        for h in found["hypotheses"]
    ]
    return "\n".join(
        [
            f"# {found['title']}",
            "",
            f"    {found['command']}",
            "",
            " ".join((experiment.run.__doc__ or "").split()),
            "",
            f"The task is `benchmarks/addition.py`: {scale['prompts']} prompts to train on, eight answers to each, "
            f"{scale['held_out']} held-out prompts with a greedy and two sampled answers, seeds "
            f"{', '.join(map(str, scale['seeds']))}, of which each has a start of its own. Square brackets have 95 % "
            "intervals over the prompts of all seeds, paired by prompt for differences; beside them stands what each "
            "seed gives alone. Right answers are in percent, closeness too; KL is k3 in nats per answer.",
            "",
            f"Commit {found['commit']}, {', '.join(map(' '.join, found['versions'].items()))}, {found['cpu_seconds']} "
            f"CPU seconds with one thread. Raw numbers: [{found['name']}.json]({found['name']}.json).",
            "",
            "## Expected before the run, and what came out",
            "",
            "| expected | why | difference | each seed | outcome |",
            "|---|---|---|---|---|",
            *expected,
            "",
            "## Every arm",
            "",
            "| " + " | ".join(["arm", *head, f"{head[0]}, each seed", *(["settings"] if settings else [])]) + " |",
            "|---" * (len(head) + 2 + settings) + "|",
            *(_row(line, experiment.measures, settings=settings) for line in found["arms"]),
            "",
        ]
    )  # fmt: skip


def _row(line: Mapping[str, Any], measures: Sequence[str], *, settings: bool) -> str:
    failures = [f"seed {seed} failed: {message}" for seed, message in line["failures"].items()]
    cells = [_cell(measure, line[measure], "value") if measure in line else "" for measure in measures]
    each = _each(measures[0], line[measures[0]]) if measures[0] in line else ""
    last = [line["settings"]] if settings else []
    return "| " + " | ".join([line["name"], *cells, "; ".join([each, *failures]), *last]) + " |"


def _number(measure: str, value: float, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{value:{sign}.2f}" if measure == "kl" else f"{100 * value:{sign}.1f}"


def _cell(measure: str, found: Mapping[str, Any], key: str, *, signed: bool = False) -> str:
    low, high = (found[f"{key}_{end}" if key == "difference" else end] for end in ("low", "high"))
    value, *ends = (_number(measure, x, signed=signed) for x in (found[key], low, high))
    return f"{value} [{', '.join(ends)}]"


def _each(measure: str, found: Mapping[str, Any], *, signed: bool = False) -> str:
    return ", ".join(_number(measure, value, signed=signed) for value in found["seeds"].values())


def run(name: str, scale: Scale, out: Path, docs: Path) -> dict[str, Any]:
    """Run an experiment and write its numbers and its page into `docs`."""
    bench, clock = Bench(out, name, scale), out / name / "cpu_seconds"
    before = float(clock.read_text()) if clock.exists() else 0.0  # of runs that were cut
    try:
        with (out / f"{name}.log").open("a") as log, redirect_stderr(log):
            EXPERIMENTS[name].run(bench)
    finally:
        seconds = before + time.process_time()
        clock.write_text(str(seconds))
    found = report(name, scale, bench.arms, seconds)
    docs.mkdir(parents=True, exist_ok=True)
    (docs / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (docs / f"{name}.md").write_text(page(found))
    return found


def main() -> None:
    """Run the experiments that are named, or all of them, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--quick", action="store_true", help="one seed and few rows: a look at what would run")
    parser.add_argument("--seeds", type=int, nargs="+", help="the draws of everything random (0 1 2)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "results")
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else Scale()
    if arguments.seeds:
        scale = replace(scale, seeds=tuple(arguments.seeds))
    for name in arguments.names or EXPERIMENTS:
        if name not in EXPERIMENTS:
            parser.error(f"no experiment '{name}'; there are {', '.join(EXPERIMENTS)}")
        found = run(name, scale, arguments.out, arguments.docs)
        print(
            "\n".join(
                f"{h['outcome']}: {h['measure']}, {h['arm']} {SIGNS[h['sign']]} {h['other']}"
                for h in found["hypotheses"]
            )
        )


if __name__ == "__main__":
    main()
