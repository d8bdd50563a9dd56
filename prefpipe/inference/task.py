"""What `generate` and `evaluate` sample: prompts, policy and rewards, read and identified. `filling` samples them."""

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefpipe import log
from prefpipe.config.engine import EngineConfig, SamplingConfig
from prefpipe.engines.base import Draw, EngineSettings
from prefpipe.errors import RowFault, UsageError
from prefpipe.ids import IdSet, content_id, ids_digest, sample_seed
from prefpipe.inference import sampling
from prefpipe.inference.cutting import fitting_rows, shards_of, take_part
from prefpipe.inference.sampling import Encode, EncodedPrompt, SampledPrompt
from prefpipe.inputs import files, hub
from prefpipe.inputs.prompts import Prompts, read_prompts
from prefpipe.models.chat import Chat, load_chat, stop_ids
from prefpipe.models.encoding import Rules, encode_prompt
from prefpipe.models.notices import check_ends, notices
from prefpipe.models.policy import Policy, context_length, resolve
from prefpipe.rewards.base import Answer, RewardFunction, RewardOn, answer_of
from prefpipe.rewards.rating import load_rewards
from prefpipe.rows import why_dropped
from prefpipe.runs import store
from prefpipe.runs.manifests import Balance
from prefpipe.runs.resume import ROWS, RowInputs
from prefpipe.runs.store import Run
from prefpipe.schemas import Dropped, Prompt, to_table


@dataclass(frozen=True)
class Task:
    """What a run samples, with which policy, and how completions are rated.

    prompts: the prompts of this run
    of_all_parts: the prompts of the runs of all parts
    repeated: ledger rows of prompts that occur more than once in the file
    policy: the model with its adapter
    chat: its tokenizer and chat template
    rewards: reward functions by name
    inputs: identity of each input, by name, for the fingerprint of the run
    source: the file of the prompts, or the name of their dataset
    read_state: the state of the file before it was read
    stop_token_ids: token ids that end a completion beside those of the model
    """

    prompts: Prompts
    of_all_parts: Prompts
    repeated: list[Dropped]
    policy: Policy
    chat: Chat
    rewards: Mapping[str, RewardFunction]
    inputs: Mapping[str, str]
    source: str
    read_state: object
    stop_token_ids: tuple[int, ...] = ()

    def portable(self) -> "Task":
        """The task without prompts and rewards: what a worker needs to tokenise prompts and to make rows of samples."""
        none = replace(self.prompts, kept=b"", copy=None)
        return replace(self, prompts=none, of_all_parts=none, repeated=[], rewards={}, read_state=None)


def read_task(config: SamplingConfig, reward_names: Sequence[str]) -> Task:
    """Read and identify everything that sampling needs, before the output directory is touched.

    Raises UsageError without prompts, and the errors of reading prompts, model, chat template and rewards.
    """
    if not config.prompts:
        raise UsageError("no prompts given", "pass --prompts FILE (JSONL or Parquet)")
    state = files.state([config.prompts])
    prompts, repeated = read_prompts(config.prompts, config.split, config.limit, files.renames(config.column))
    policy = resolve(config.model, config.adapter)
    chat = read_chat(config, policy)
    for notice in notices(chat):
        log.info(f"notice: {notice}")
    check_ends(chat)
    functions, reward_ids = load_rewards(reward_names, config.reward_settings)
    inputs = {"prompts": files.digest(config.prompts), "policy": policy.id, **chat.digests, **reward_ids}
    stops = tuple(sorted({*config.stop_token_ids, *stop_ids(chat, config.stop)}))
    part = take_part(prompts, config.part)
    return Task(part, prompts, repeated, policy, chat, functions, inputs, config.prompts, state, stops)


def read_chat(config: EngineConfig, policy: Policy) -> Chat:
    """Tokenizer and chat template of a policy under the settings. Raises as `load_chat` does."""
    return load_chat(
        policy.directory,
        config.chat_template,
        config.template_date,
        template_kwargs=config.chat_template_kwargs,
        thinking_marks=config.thinking_marks,
    )


@contextmanager
def open_task(
    out: Path, command: str, config: SamplingConfig, task: Task, *, force: bool
) -> Generator[tuple[Run, Task]]:
    """Open `out` for this task, see `open_run`. Returns the run, and the task with prompts cut into shards as this run
    cuts them.

    Where the file of prompts was mended since, shards of unchanged prompts stay. A dataset of the hub has no digest:
    its name is part of the run's identity.
    """

    def digests(saved: Mapping[str, Any]) -> Iterator[str]:
        shards = sampling.cut(task.prompts.places(), *shards_of(task.prompts, saved))
        return (sampling.rows_of(shard)[ROWS] for _, shard in shards)

    by_row = RowInputs([] if hub.is_hub(config.prompts) else ["prompts"], digests)
    # The size of the first start is saved, so that a mended file is cut as before.
    config = config.model_copy(update={"shard_rows": config.shard_rows or fitting_rows(len(task.prompts))})
    with store.open_run(out, command, config, task.inputs, force=force, by_row=by_row) as run:
        older = not run.records_rows
        prompts = take_part(task.of_all_parts.without_places(), config.part) if older else task.prompts
        yield run, replace(task, prompts=prompts)


def longest_sequence(task: Task, config: SamplingConfig) -> int:
    """The largest number of tokens that a prompt and its completion can have together."""
    return _longest_prompt(config, task.policy) + config.max_tokens


def gather_ledger(run: Run, num_prompts: int, before: Sequence[Dropped]) -> None:
    """Write dropped.parquet: the rows of `before`, and those of the prompts that shards dropped."""
    dropped = run.gather_dropped(Dropped, to_table(Dropped, list(before)))
    if before:
        log.warn(f"rows of prompts left out: {why_dropped(before)}; dropped.parquet has them all")
    if dropped:
        log.warn(f"{dropped} of {num_prompts} prompts dropped; the reasons are in dropped.parquet")


def balances(
    run: Run, task: Task, num_shards: int, dataset: str, row_type: type, num_samples: int, folder: str = ""
) -> Iterator[Balance]:
    """The balance of the prompts, and that of the `num_samples` samples of each prompt in a dataset of `folder`."""
    kept, rows, dropped = IdSet(), 0, 0
    num_kept = 0
    for index in range(num_shards):
        dropped += run.read_part(f"{folder}dropped", Dropped, index, ["id"]).num_rows
        ids = run.read_part(folder + dataset, row_type, index, ["prompt_id"])["prompt_id"]
        rows += len(ids)
        num_kept += sum(kept.add(prompt_id) for prompt_id in ids.unique().to_pylist())
    yield Balance("prompts", len(task.prompts), num_kept, dropped)
    yield Balance("samples", num_kept * num_samples, rows)


def encoder(task: Task, config: SamplingConfig, killers: Collection[str] = ()) -> Encode:
    """A function that tokenises a prompt, or raises RowFault with the reason why it cannot be sampled. `killers` are
    the ids of prompts that killed the engine twice."""
    longest = _longest_prompt(config, task.policy)
    rules = Rules.of(config)

    def encode(prompt: Prompt) -> list[int]:
        if prompt.prompt_id in killers:
            raise RowFault("engine_died", "the engine died twice while it worked on this prompt")
        return encode_prompt(task.chat, prompt.messages, prompt.template_inputs, max_tokens=longest, rules=rules)

    return encode


def engine_settings(task: Task, config: SamplingConfig, max_model_len: int) -> EngineSettings:
    """Engine settings with room for `max_model_len` tokens in prompt and completion."""
    return EngineSettings.of(
        config, task.policy, task.chat, max_model_len=max_model_len, stop_token_ids=task.stop_token_ids
    )


def sampled_draws(config: SamplingConfig, indices: range, prompt: Prompt) -> tuple[Draw, ...]:
    """The completions to sample at the temperature of the run, one for each sample_index in `indices`."""
    return tuple(Draw(k, sample_seed(config.seed, prompt.prompt_id, k), config.temperature) for k in indices)


def prompt_key(config: SamplingConfig, task: Task, encoded: EncodedPrompt) -> str:
    """The key that all completions of a prompt share: its messages and ids, the policy and the sampling settings.

    The id of a completion is a hash of this key and its sample_index; num_samples and the order of prompts have no part
    in it.
    """
    settings = [
        *(config.engine, config.dtype, config.seed, config.temperature, config.top_p, config.top_k, config.min_p),
        *(config.max_tokens, task.stop_token_ids),
    ]
    return content_id(encoded.prompt.prompt_id, ids_digest(encoded.token_ids, ()), task.policy.id, settings)


def answers_of(sampled: Sequence[SampledPrompt], reward_on: RewardOn) -> list[Answer]:
    """Every sample as an answer to rate, in the order of `sampled`, so that the samples of a prompt stand together."""
    return [
        answer_of(prompt.encoded.prompt, said, len(sample.token_ids), reward_on)
        for prompt in sampled
        for said, sample in zip(prompt.said, prompt.samples, strict=True)
    ]


def _longest_prompt(config: SamplingConfig, policy: Policy) -> int:
    """max_prompt_tokens, or less where prompt, completion and one more token would exceed the model's context."""
    context = context_length(policy.directory)
    if context is None:
        return config.max_prompt_tokens
    return min(config.max_prompt_tokens, context - config.max_tokens - 1)
