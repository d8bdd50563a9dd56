"""`prefpipe score`: reference log-probs and rewards for completions, pairs or labels that exist already."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from prefpipe import clock, log
from prefpipe.config.score import ScoreConfig
from prefpipe.config.shared import IMPORTED_REWARD
from prefpipe.engines import base
from prefpipe.engines.base import Engine, EngineSettings
from prefpipe.errors import DataError, UsageError
from prefpipe.ids import IdSet, ids_digest
from prefpipe.inference import parity, scoring, task
from prefpipe.inference.inflight import Inflight
from prefpipe.inputs.tokenised import Limits
from prefpipe.models import vocabulary
from prefpipe.models.chat import Chat, load_chat
from prefpipe.models.policy import Policy, context_length, resolve
from prefpipe.rewards import rating
from prefpipe.rewards.base import RewardFunction
from prefpipe.rows import ROW_TYPES, Logps, filled, key_column
from prefpipe.runs import store
from prefpipe.runs.store import Manifest, Run
from prefpipe.schemas import Completion, Dropped, RefLogps, Reward, among, from_table, to_table
from prefpipe.stages.score import sources
from prefpipe.stages.score.imports import RATING_FOLDER, Known
from prefpipe.stages.score.sources import Batch, Reader

_KEYED: dict[str, type] = {**ROW_TYPES, RATING_FOLDER: Reward}


@dataclass(frozen=True)
class Shard:
    """A shard of the output: its number, its datasets, and what goes into it."""

    index: int
    datasets: tuple[str, ...]
    read: Callable[[], Batch]


def run(config: ScoreConfig, out: Path, *, force: bool) -> Manifest:
    """Score and rate every row that has no committed shard yet, a shard at a time."""
    _check(config)
    policy = resolve(config.model, config.adapter)
    chat = load_chat(policy.directory, config.chat_template, config.template_date)
    config = config.model_copy(update={"max_length": _longest(config, policy)})
    functions, reward_ids = rating.load_rewards(config.rewards, config.reward_settings)
    inputs = {f"inputs.{i}": sources.digest(source) for i, source in enumerate(config.inputs)} | reward_ids
    inputs |= {"reference": policy.id} if config.reference == "policy" else {}
    inputs |= chat.digests if any(not Path(source).is_dir() for source in config.inputs) else {}
    for source in (Path(s) for s in config.inputs if Path(s).is_dir()):
        sources.notice_other_chat(source, chat)
    with store.open_run(out, "score", config, inputs, force=force) as output:
        manifest = output.manifest()
        if manifest is not None:
            return manifest
        stage = _Stage(config, output, policy, chat, functions)
        inflight = Inflight.load(out)
        missing = stage.missing()
        first = next(missing, None)
        if first is not None:
            start = clock.monotonic()
            rows = stage.fill(chain([first], missing), inflight)
            output.log_timing(event="scored", rows=rows, seconds=round(clock.monotonic() - start, 3))
        inflight.close()
        output.gather_dropped(Dropped, to_table(Dropped, []))
        totals = stage.totals()
        if config.check and config.reference == "policy":
            totals["parity"] = stage.check()
            output.write_report("parity.json", totals["parity"])
        tokens = vocabulary.record(vocabulary.of_sources(config.inputs, policy.directory))
        return output.finish(totals, {"reference": policy.id if config.reference == "policy" else None, **tokens})


def summary(manifest: Manifest, out: Path) -> list[str]:
    """What the command prints when it is done."""
    t = manifest["totals"]
    parts = ", ".join(f"{count} {name}" for name, count in t["rows"].items() if count)
    lines = [f"{parts or 'rewards'} in {out}"]
    if t["tokens"]:
        lines.append(f"  reference log-probs: {t['tokens']} tokens, mean {t['mean_token_logp']:.4f} nats")
    lines += [f"  reward {name}: mean {mean:.3f}" for name, mean in t["mean_reward"].items() if mean is not None]
    lines += [f"  dropped: {', '.join(f'{r}: {n}' for r, n in t['dropped'].items())}"] if t["dropped"] else []
    return [*lines, *(parity.table(t["parity"]) if "parity" in t else [])]


@dataclass(frozen=True)
class _Stage:
    config: ScoreConfig
    run: Run
    policy: Policy
    chat: Chat
    rewards: Mapping[str, RewardFunction]
    known: Known = field(default_factory=lambda: defaultdict(IdSet))

    @property
    def limits(self) -> Limits:
        c = self.config
        return Limits(c.max_prompt_length, c.max_length, c.overlong, c.special_tokens_in_prompts)

    @property
    def settings(self) -> EngineSettings:
        c = self.config
        return EngineSettings(
            self.policy,
            self.chat,
            c.dtype,
            1.0,
            1,
            c.max_length,
            c.max_num_seqs,
            c.kv_cache_mib,
            tensor_parallel_size=c.tensor_parallel_size,
            gpu_memory_utilization=c.gpu_memory_utilization,
            max_tokens_per_batch=c.max_tokens_per_batch,
        )

    def has(self, shard: Shard) -> bool:
        return all(self.run.has_part(name, shard.index) for name in shard.datasets)

    def shards(self) -> Iterator[Shard]:
        """All shards of all inputs, numbered in their order; nothing is tokenised before it is asked for.

        Those of files are read once and in this order: what an earlier shard holds is no part of a later one.
        """
        scores = (
            *(("ref_logps",) if self.config.reference == "policy" else ()),
            *map(rating.reward_folder, self.rewards),
            "dropped",
        )
        reader = Reader(self.chat, self.limits, self.run.saved["shard_rows"], bool(self.rewards), self.known)
        found = chain.from_iterable(sources.shards(source, reader) for source in self.config.inputs)
        for index, (datasets, read) in enumerate(found):
            yield Shard(index, (*datasets, *scores), read)

    def missing(self) -> Iterator[Shard]:
        """The shards without a commit. What committed ones hold is made known on the way, from their key columns."""
        for shard in self.shards():
            if not self.has(shard):
                yield shard
            elif "completions" in shard.datasets:
                self._remember(shard)

    def _remember(self, shard: Shard) -> None:
        dropped = from_table(Dropped, self.run.read_part("dropped", Dropped, shard.index))
        lost = [row.id for row in dropped if row.reason == sources.ENGINE_DIED]
        for dataset in _KEYED.keys() & {*shard.datasets}:
            column = key_column(_KEYED[dataset])
            part = self.run.read_part(dataset, _KEYED[dataset], shard.index, [column])
            for key in (*part[column].to_pylist(), *lost):
                self.known[dataset].add(key)

    def fill(self, shards: Iterable[Shard], inflight: Inflight) -> int:
        """Score, rate and commit shards; returns the number of rows scored."""
        if self.config.reference == "none":
            for shard in shards:
                self.commit(shard, shard.read(), {})
            return 0
        with task.start_engine(self.config.engine, self.settings) as engine, inflight.recording():
            return sum(self._score(shards, engine, inflight))

    def _score(self, shards: Iterable[Shard], engine: Engine, inflight: Inflight) -> Iterator[int]:
        """Rows scored, shard by shard, as shards are whole."""
        killers = scoring.killers(inflight)
        reading: dict[int, tuple[Shard, Batch]] = {}

        def sequences() -> Iterator[scoring.Shard]:
            for shard in shards:
                batch = sources.without(shard.read(), killers)
                reading[shard.index] = shard, batch
                yield shard.index, batch.sequences

        for index, values in scoring.score_shards(sequences(), engine, inflight, self._expected()):
            shard, batch = reading.pop(index)
            self.commit(shard, batch, self._references(batch, values, engine.scorer))
            yield len(values)

    def _references(self, batch: Batch, values: Mapping[str, list[float]], scorer: str) -> Logps:
        return {
            s.completion_id: RefLogps(s.completion_id, self.policy.id, scorer, digest, own, sum(own), len(own))
            for s in batch.sequences
            for own, digest in [(values[s.completion_id], ids_digest(s.prompt_token_ids, s.token_ids))]
        }

    def _expected(self) -> float | None:
        """Rows to score, for the progress bar, where all inputs say it: runs of completions do."""
        if not all(Path(s).is_dir() for s in self.config.inputs):
            return None
        counts = [store.read_manifest(Path(s)) for s in self.config.inputs]
        known = all(m["command"] == "generate" for m in counts)
        return sum(m["totals"]["completions"] for m in counts) if known else None

    def commit(self, shard: Shard, batch: Batch, logps: Logps) -> None:
        """Write one shard: rows with their reference values, log-probs, rewards, and what was left out."""
        written: dict[str, tuple[type, list[Any]]] = {
            name: (ROW_TYPES[name], [filled(row, logps) for row in rows]) for name, rows in batch.rows.items()
        }
        written["ref_logps"] = (RefLogps, [row for name, row in logps.items() if name not in batch.elsewhere])
        written[RATING_FOLDER] = (Reward, batch.ratings)
        for name, function in self.rewards.items():
            scores = rating.rate([answer for _, answer in batch.answers], function, name)
            ids = [completion_id for completion_id, _ in batch.answers]
            written[rating.reward_folder(name)] = (
                Reward,
                [Reward(i, name, s.reward, s.status, s.detail) for i, s in zip(ids, scores, strict=True)],
            )
        written["dropped"] = (Dropped, batch.dropped)
        for name in shard.datasets:
            row_type, rows = written[name]
            self.run.write_part(name, row_type, shard.index, to_table(row_type, rows))

    def totals(self) -> dict[str, Any]:
        """Counts over all shards, read column by column: the same whether the run was interrupted or not."""
        rows = {name: self._tally(name, row_type, None)[0] for name, row_type in ROW_TYPES.items() if name != "prompts"}
        rows["ref_logps"], total = self._tally("ref_logps", RefLogps, "ref_logps")
        _, tokens = self._tally("ref_logps", RefLogps, "num_tokens")
        means: dict[str, float | None] = {}
        rated = 0
        for name in (*self.rewards, IMPORTED_REWARD):
            count, reward = self._tally(rating.reward_folder(name), Reward, "reward")
            means[name] = reward / count if count else None
            rated += self._tally(rating.reward_folder(name), Reward, None)[0]
        if not rated and not any(rows.values()):
            raise DataError("no row is left", f"see {self.run.out}/dropped.parquet for every row and its reason")
        reasons = Counter(r for part in self._column("dropped", Dropped, "reason") for r in part)
        return {
            "rows": rows,
            "tokens": int(tokens),
            "mean_token_logp": total / tokens if tokens else None,
            "mean_reward": means,
            "dropped": dict(sorted(reasons.items())),
        }

    def _tally(self, dataset: str, row_type: type, column: str | None) -> tuple[int, float]:
        """(number, sum) of the values of a column that are there; without a column, (number of rows, 0)."""
        count, total = 0, 0.0
        for part in self._column(dataset, row_type, column):
            present = [v for v in part if v is not None]
            count += len(present)
            total += sum(present) if column else 0
        return count, total

    def _column(self, dataset: str, row_type: type, column: str | None) -> Iterator[list[Any]]:
        name = column or key_column(row_type)
        for index in self.run.parts(dataset):
            yield self.run.read_part(dataset, row_type, index, [name])[name].to_pylist()

    def check(self) -> dict[str, Any]:
        """Score random rows again with the other scorer."""
        names = (n for part in self._column("ref_logps", RefLogps, "completion_id") for n in part)
        picked = parity.pick(names, self.config.check, self.config.seed)
        rows: dict[str, RefLogps] = {}
        for index in self.run.parts("ref_logps"):
            part = among(self.run.read_part("ref_logps", RefLogps, index), pa.array(sorted(picked)))
            rows |= {r.completion_id: r for r in from_table(RefLogps, part)}
        found = {
            s.completion_id: s for shard in self.shards() for s in self._sequences(shard) if s.completion_id in picked
        }
        checked = [parity.Checked(found[name], rows[name].token_logps) for name in sorted(picked)]
        scorer = next(iter(rows.values())).scorer if rows else ""
        return parity.check(checked, self.config.engine, scorer, self.settings, adapter=True)

    def _sequences(self, shard: Shard) -> Iterable[base.ScoreRequest]:
        """The sequences of a committed shard; imported ones from what was written: nothing is tokenised twice."""
        if "completions" not in shard.datasets:
            return shard.read().sequences
        written = from_table(Completion, self.run.read_part("completions", Completion, shard.index))
        return [base.ScoreRequest(c.completion_id, c.prompt_token_ids, c.token_ids) for c in written]


def _check(config: ScoreConfig) -> None:
    if not config.inputs:
        raise UsageError("no inputs given", "pass --inputs: a run directory, a .jsonl or .parquet file, or hf://...")
    if config.reference == "none" and not config.rewards and all(Path(s).is_dir() for s in config.inputs):
        raise UsageError("nothing to do: no reference and no rewards", "pass --rewards NAME, or --reference policy")


def _longest(config: ScoreConfig, policy: Policy) -> int:
    """max_length inside the model's context; one token less, which vLLM's scoring asks for."""
    context = context_length(policy.directory)
    if context is not None and config.max_length > context - 1:
        log.info(f"max_length is {context - 1}: the model's context is {context} tokens")
        return context - 1
    return config.max_length
