"""Stage 1, `prefpipe generate`: prompts -> completions, with reference log-probs and rewards beside them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from prefpipe.config.generate import GenerateConfig
from prefpipe.engines.base import Draw, Engine, ScoreRequest
from prefpipe.ids import ids_digests, numbered_id, sample_seed
from prefpipe.inference import parity
from prefpipe.inference.sampling import Sampled
from prefpipe.inference.task import Task, answers_of, engine_settings, prompt_key, read_task, run_shards
from prefpipe.models import vocabulary
from prefpipe.rewards import rating
from prefpipe.runs import store
from prefpipe.runs.store import Manifest, Run
from prefpipe.schemas import Completion, Dropped, Prompt, RefLogps, Reward, among, from_table, to_table

R = TypeVar("R")


def run(config: GenerateConfig, out: Path, *, force: bool) -> Manifest:
    """Sample, score and rate every prompt that has no committed shard yet."""
    task = read_task(config, config.rewards)
    with store.open_run(out, "generate", config, task.inputs, force=force) as output:
        manifest = output.manifest()
        if manifest is not None:
            return manifest
        stage = _Stage(config, output, task)
        num_shards = run_shards(output, task, config, stage)
        totals = stage.totals(num_shards)
        if config.check and stage.reference:
            totals["parity"] = stage.check(num_shards)
            output.write_report("parity.json", totals["parity"])
        tokens = vocabulary.record([vocabulary.name(vocabulary.read(task.policy.directory))])
        return output.finish(totals, {"policy": task.policy.id, "reference": stage.reference, **tokens})


def summary(manifest: Manifest, out: Path) -> list[str]:
    """What the command prints when it is done."""
    t = manifest["totals"]
    lines = [f"{t['completions']} completions of {t['prompts']} prompts in {out}, {t['tokens']} tokens"]
    lines += [f"  reward {name}: mean {mean:.3f}" for name, mean in t["mean_reward"].items() if mean is not None]
    return [*lines, *(parity.table(t["parity"]) if "parity" in t else [])]


@dataclass(frozen=True)
class _Stage:
    config: GenerateConfig
    run: Run
    task: Task

    @property
    def reference(self) -> str | None:
        """The id of the reference, if its log-probs are cached."""
        return {"policy": self.task.policy.id, "base": self.task.policy.base_id, "none": None}[self.config.reference]

    def datasets(self) -> list[str]:
        """The datasets of one shard; the completions come last, so that a shard with them is whole."""
        references = ["ref_logps"] if self.reference else []
        return ["dropped", "prompts", *references, *map(rating.reward_folder, self.task.rewards), "completions"]

    def has(self, index: int) -> bool:
        return all(self.run.has_part(name, index) for name in self.datasets())

    def draws(self, prompt: Prompt) -> tuple[Draw, ...]:
        seed, temperature = self.config.seed, self.config.temperature
        return tuple(
            Draw(k, sample_seed(seed, prompt.prompt_id, k), temperature) for k in range(self.config.num_samples)
        )

    def commit(self, index: int, sampled: list[Sampled], dropped: list[Dropped], engine: Engine) -> None:
        """Write one shard: dropped prompts, prompts, reference log-probs, rewards, completions."""
        completions = [c for s in sampled for c in self._completions(s)]
        self.run.write_part("dropped", Dropped, index, to_table(Dropped, dropped))
        self.run.write_part("prompts", Prompt, index, to_table(Prompt, [s.ready.prompt for s in sampled]))
        if self.reference:
            rows = self._references(completions, sampled, engine)
            self.run.write_part("ref_logps", RefLogps, index, to_table(RefLogps, rows))
        answers = answers_of(sampled) if self.task.rewards else []
        for name, function in self.task.rewards.items():
            rows = [
                Reward(c.completion_id, name, s.reward, s.status, s.detail)
                for c, s in zip(completions, rating.rate(answers, function, name), strict=True)
            ]
            self.run.write_part(rating.reward_folder(name), Reward, index, to_table(Reward, rows))
        self.run.write_part("completions", Completion, index, to_table(Completion, completions))

    def totals(self, num_shards: int) -> dict[str, Any]:
        """Counts over all shards, read column by column: the same whether the run was interrupted or not."""
        counts = {"prompts": 0, "completions": 0, "tokens": 0}
        for index in range(num_shards):
            part = self.run.read_part("completions", Completion, index, ["prompt_id", "token_ids"])
            counts["prompts"] += len(part["prompt_id"].unique())
            counts["completions"] += part.num_rows
            lengths = pc.call_function("list_value_length", [part["token_ids"]])
            counts["tokens"] += pc.call_function("sum", [lengths]).as_py() or 0
        means: dict[str, float | None] = {}
        for name in self.task.rewards:
            values = [v for i in range(num_shards) for v in self._rewards(name, i) if v is not None]
            means[name] = sum(values) / len(values) if values else None
        return {**counts, "mean_reward": means}

    def check(self, num_shards: int) -> dict[str, Any]:
        """Score random rows again with the other scorer: captured values against computed ones."""
        ids = [self.run.read_part("ref_logps", RefLogps, i, ["completion_id"]) for i in range(num_shards)]
        names = (name for part in ids for name in part["completion_id"].to_pylist())
        picked = pa.array(sorted(parity.pick(names, self.config.check, self.config.seed)))
        rows: list[parity.Checked] = []
        longest, scorer = 1, ""
        for index in (i for i, part in enumerate(ids) if among(part, picked).num_rows):
            logps = {r.completion_id: r for r in self._picked("ref_logps", RefLogps, index, picked)}
            for c in self._picked("completions", Completion, index, picked):
                sequence = ScoreRequest(c.completion_id, c.prompt_token_ids, c.token_ids)
                rows.append(parity.Checked(sequence, logps[c.completion_id].token_logps))
                longest = max(longest, len(c.prompt_token_ids) + len(c.token_ids))
                scorer = logps[c.completion_id].scorer
        settings = engine_settings(self.task, self.config, longest)
        adapter = self.reference == self.task.policy.id
        return parity.check(rows, self.config.engine, scorer, settings, adapter=adapter)

    def _rewards(self, name: str, index: int) -> list[float | None]:
        return self.run.read_part(rating.reward_folder(name), Reward, index, ["reward"])["reward"].to_pylist()

    def _picked(self, dataset: str, row_type: type[R], index: int, completion_ids: pa.Array) -> list[R]:
        return from_table(row_type, among(self.run.read_part(dataset, row_type, index), completion_ids))

    def _completions(self, sampled: Sampled) -> Iterator[Completion]:
        ready, policy = sampled.ready, self.task.policy.id
        key = prompt_key(self.config, self.task, ready)
        digests = ids_digests(ready.token_ids, [s.token_ids for s in sampled.samples])
        for sample, text, digest in zip(sampled.samples, sampled.texts, digests, strict=True):
            yield Completion(
                completion_id=numbered_id(key, sample.sample_index),
                prompt_id=ready.prompt.prompt_id,
                sample_index=sample.sample_index,
                text=text,
                prompt_token_ids=ready.token_ids,
                token_ids=sample.token_ids,
                finish_reason=sample.finish_reason,
                policy=policy,
                ids_digest=digest,
            )

    def _references(self, completions: list[Completion], sampled: list[Sampled], engine: Engine) -> list[RefLogps]:
        """Captured while sampling when the policy is the reference; else one scoring pass with the adapter off."""
        if self.reference == self.task.policy.id:
            logps = [sample.token_logps for s in sampled for sample in s.samples]
        else:
            given = [ScoreRequest(c.completion_id, c.prompt_token_ids, c.token_ids) for c in completions]
            scored = dict(engine.score(given, adapter=False))
            logps = [scored[c.completion_id] for c in completions]
        reference, scorer = self.reference, engine.scorer
        assert reference is not None
        return [
            RefLogps(c.completion_id, reference, scorer, c.ids_digest, values, sum(values), len(values))
            for c, values in zip(completions, logps, strict=True)
        ]
