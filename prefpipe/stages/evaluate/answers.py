"""The answers of a policy to a set of prompts: sampled, rated and committed shard by shard, and read back."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.engines.base import Draw, Engine
from prefpipe.ids import content_id, numbered_id
from prefpipe.inference import filling, sampling, task
from prefpipe.inference.cutting import shards_of
from prefpipe.inference.filling import Start
from prefpipe.inference.sampling import SampledPrompt, SampledShard
from prefpipe.inference.task import Task
from prefpipe.inference.works import Part, Rewards, part_of
from prefpipe.rewards import rating
from prefpipe.rewards.base import Answer, Scored, answer_of
from prefpipe.runs import commits
from prefpipe.runs.manifests import Balance
from prefpipe.runs.resume import ROWS
from prefpipe.runs.store import Run
from prefpipe.schemas import Dropped, Evaluation, Prompt, from_table

DATASET = "evaluations"
_KEY_DIGITS = 16


@dataclass(frozen=True)
class Answers:
    """The committed answers of a run to the prompts of a task; `folder` (with a slash) is where its datasets stand.

    num_shards: shards of the task; num_samples: answers to one prompt
    """

    run: Run
    task: Task
    folder: str
    num_shards: int
    num_samples: int

    def rows(self, index: int) -> list[Evaluation]:
        """The answers of a shard; those to one prompt stand together, the greedy one first."""
        return from_table(Evaluation, self.run.read_part(self.folder + DATASET, Evaluation, index))

    def shards(self) -> Iterator[list[Evaluation]]:
        """The answers of every shard."""
        return map(self.rows, range(self.num_shards))

    def dropped(self) -> list[Dropped]:
        """The prompts that cannot be sampled."""
        parts = (self.run.read_part(f"{self.folder}dropped", Dropped, index) for index in range(self.num_shards))
        return [row for part in parts for row in from_table(Dropped, part)]

    def lacking(self, dataset: str) -> set[int]:
        """The shards for which a dataset has no part, or one of other answers."""
        self.run.set_aside_from(dataset, self.num_shards)
        return {
            index for index in range(self.num_shards) if not self.run.has_shard([dataset], index, self.rows_of(index))
        }

    def rows_of(self, index: int) -> dict[str, str]:
        """The digest of the prompts of a shard, for the commit records of what is computed from its answers. Shards of
        an older version have none."""
        digest = commits.recorded_value(self.run.part(self.folder + DATASET, index), ROWS)
        return {} if digest is None else {ROWS: digest}

    def with_prompts(self, shards: set[int]) -> Iterator[tuple[int, list[tuple[Prompt, Evaluation]]]]:
        """(index, every answer with its prompt) of some shards."""
        rows, _ = shards_of(self.task.prompts, self.run.saved)
        for index, prompts in sampling.cut(self.task.prompts.places(), rows, shards):
            by_id = {prompt.prompt_id: prompt for prompt in prompts}
            yield index, [(by_id[row.prompt_id], row) for row in self.rows(index)]

    def balances(self) -> Iterator[Balance]:
        """What became of prompts and samples."""
        return task.balances(
            self.run, self.task, self.num_shards, DATASET, Evaluation, self.num_samples, folder=self.folder
        )


def sample(config: EvaluateConfig, run: Run, of: Task, start: Start, *, num_samples: int, folder: str = "") -> Answers:
    """Sample, rate and commit every shard of a task that is not there yet: a greedy answer to each prompt, and
    `num_samples` sampled ones."""
    rewards = Rewards(of.rewards, config.reward_settings)
    count = filling.sample_missing(
        run,
        of,
        config,
        [f"{folder}dropped", folder + DATASET],
        partial(draws, config, num_samples),
        partial(_parts, config, of.portable(), rewards, folder),
        start,
        folder,
    )
    return Answers(run, of, folder, count, num_samples + 1)


def draws(config: EvaluateConfig, num_samples: int, prompt: Prompt) -> tuple[Draw, ...]:
    """The completions to sample for a prompt: 0 is greedy, the others are sampled."""
    return Draw(0, 0, 0.0), *task.sampled_draws(config, range(1, num_samples + 1), prompt)


def key(*parts: str) -> str:
    """A name for a folder of a run that stands for what its rows depend on."""
    return content_id(*parts)[:_KEY_DIGITS]


def to_rate(config: EvaluateConfig, of: Task, answered: Sequence[tuple[Prompt, Evaluation]]) -> list[Answer]:
    """Committed answers as rewards see them: their reasoning is parted off by their token ids, as when they were
    sampled."""
    texts = of.chat.decode_all([row.token_ids for _, row in answered])
    return [
        answer_of(prompt, of.chat.said(row.token_ids, text), len(row.token_ids), config.reward_on)
        for (prompt, row), text in zip(answered, texts, strict=True)
    ]


def _parts(
    config: EvaluateConfig, of: Task, rewards: Rewards, folder: str, shard: SampledShard, _engine: Engine
) -> list[Part]:
    """The datasets of one shard. The evaluations come last, so that a shard with them is whole."""
    (name, function), *_ = rewards.functions.items()
    scores = iter(rating.rate(task.answers_of(shard.sampled, config.reward_on), function, name))
    rows = [
        _row(config, of, name, prompt, i, next(scores)) for prompt in shard.sampled for i in range(len(prompt.said))
    ]
    return [
        part_of(f"{folder}dropped", Dropped, shard.dropped, shard.rows),
        part_of(folder + DATASET, Evaluation, rows, shard.rows),
    ]


def _row(config: EvaluateConfig, of: Task, name: str, sampled: SampledPrompt, i: int, score: Scored) -> Evaluation:
    """The row of sample i of a prompt, with its score by the reward `name`."""
    sample, prompt = sampled.samples[i], sampled.encoded.prompt
    return Evaluation(
        completion_id=numbered_id(task.prompt_key(config, of, sampled.encoded), sample.sample_index),
        prompt_id=prompt.prompt_id,
        sample_index=sample.sample_index,
        round=config.round,
        decoding="greedy" if sample.sample_index == 0 else "sampled",
        messages=prompt.messages,
        text=sampled.said[i].text,
        token_ids=sample.token_ids,
        finish_reason=sample.finish_reason,
        policy=of.policy.id,
        name=name,
        reward=score.reward,
        status=score.status,
        detail=score.detail,
        thinking=sampled.said[i].thinking,
        token_logps=sample.token_logps,
    )
