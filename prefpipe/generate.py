"""Stage 1, `prefpipe generate`: prompts -> completions, with reference log-probs and rewards beside them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prefpipe import chat as chats
from prefpipe import fsio, ingest, log, models, sampling, store
from prefpipe.config.generate import GenerateConfig
from prefpipe.engines.base import Draw, Engine, Sequence
from prefpipe.errors import UsageError
from prefpipe.ids import content_id, ids_digest, sample_seed
from prefpipe.rewards.base import RewardFunction
from prefpipe.sampling import Sampled
from prefpipe.schemas import Completion, Dropped, Prompt, RefLogps, Reward, to_table
from prefpipe.store import Manifest, Run


def run(config: GenerateConfig, out: Path, *, force: bool) -> Manifest:
    """Sample, score and rate every prompt that has no committed shard yet."""
    if not config.prompts:
        raise UsageError("no prompts given", "pass --prompts FILE (JSONL or Parquet)")
    prompts_file = Path(config.prompts)
    prompts, repeated = ingest.read_prompts(prompts_file, config.split, config.limit)
    policy = models.resolve(config.model, config.adapter)
    chat = chats.load(policy.directory, config.chat_template)
    reward_functions, reward_ids = sampling.load_rewards(config.rewards, config.reward_settings)
    inputs = {"prompts": store.input_digest(prompts_file), "policy": policy.id, **chat.digests, **reward_ids}
    with store.open_run(out, "generate", config, inputs, force=force) as run_:
        manifest = run_.manifest()
        if manifest is not None:
            log.info(f"{out} is complete already")
            return manifest
        ready, faulty = sampling.prepare(
            prompts, chat, max_prompt_tokens=config.max_prompt_tokens, control_tokens=config.special_tokens_in_prompts
        )
        run_.write_dropped(Dropped, to_table(Dropped, repeated + faulty))
        stage = _Stage(config, run_, policy, chat, reward_functions)
        shards = sampling.shard(ready, run_.saved["shard_rows"])
        missing = [(index, rows) for index, rows in shards if not stage.has(index)]
        if missing:
            start = fsio.monotonic()
            settings = sampling.engine_settings(
                policy, chat, [r for _, rows in missing for r in rows], dtype=config.dtype, top_p=config.top_p,
                max_tokens=config.max_tokens, max_num_seqs=config.max_num_seqs, kv_cache_mib=config.kv_cache_mib,
            )  # fmt: skip
            with sampling.start_engine(config.engine, settings) as engine:
                tokens = sampling.sample_shards(missing, engine, stage.draws, lambda i, s: stage.commit(i, s, engine))
            run_.log_timing(event="sampled", tokens=tokens, seconds=round(fsio.monotonic() - start, 3))
        return run_.finish(stage.totals(len(shards)), {"policy": policy.id, "reference": stage.reference})


def summary(manifest: Manifest, out: Path) -> list[str]:
    """What the command prints when it is done."""
    t = manifest["totals"]
    lines = [f"{t['completions']} completions of {t['prompts']} prompts in {out}, {t['tokens']} tokens"]
    lines += [f"  reward {name}: mean {mean:.3f}" for name, mean in t["mean_reward"].items() if mean is not None]
    return lines


@dataclass(frozen=True)
class _Stage:
    config: GenerateConfig
    run: Run
    policy: models.Policy
    chat: chats.Chat
    rewards: Mapping[str, RewardFunction]

    @property
    def reference(self) -> str | None:
        """The id of the reference, if its log-probs are cached."""
        return {"policy": self.policy.id, "base": self.policy.base_id, "none": None}[self.config.reference]

    def datasets(self) -> list[str]:
        """The datasets of one shard; the completions come last, so that a shard with them is whole."""
        references = ["ref_logps"] if self.reference else []
        return ["prompts", *references, *(_reward_folder(n) for n in self.rewards), "completions"]

    def has(self, index: int) -> bool:
        return all(self.run.has_part(name, index) for name in self.datasets())

    def draws(self, prompt: Prompt) -> tuple[Draw, ...]:
        seed, temperature = self.config.seed, self.config.temperature
        return tuple(
            Draw(k, sample_seed(seed, prompt.prompt_id, k), temperature) for k in range(self.config.num_samples)
        )

    def commit(self, index: int, sampled: list[Sampled], engine: Engine) -> None:
        """Write one shard: prompts, reference log-probs, rewards, completions."""
        completions = [self._completion(s, i) for s in sampled for i in range(len(s.samples))]
        self.run.write_part("prompts", Prompt, index, to_table(Prompt, [s.ready.prompt for s in sampled]))
        if self.reference:
            rows = self._references(completions, sampled, engine)
            self.run.write_part("ref_logps", RefLogps, index, to_table(RefLogps, rows))
        for name, function in self.rewards.items():
            scores = [score for scores in sampling.rate(sampled, self.chat, function, name) for score in scores]
            rows = [
                Reward(c.completion_id, name, s.reward, s.status, s.detail)
                for c, s in zip(completions, scores, strict=True)
            ]
            self.run.write_part(_reward_folder(name), Reward, index, to_table(Reward, rows))
        self.run.write_part("completions", Completion, index, to_table(Completion, completions))

    def totals(self, num_shards: int) -> dict[str, object]:
        """Counts over all shards, the same whether the run was interrupted or not."""
        shards = [self.run.read_part("completions", Completion, i) for i in range(num_shards)]
        means: dict[str, float | None] = {}
        for name in self.rewards:
            parts = [
                self.run.read_part(_reward_folder(name), Reward, i)["reward"].to_pylist() for i in range(num_shards)
            ]
            values = [v for part in parts for v in part if v is not None]
            means[name] = sum(values) / len(values) if values else None
        return {
            "prompts": sum(len(set(s["prompt_id"].to_pylist())) for s in shards),
            "completions": sum(s.num_rows for s in shards),
            "tokens": sum(len(ids) for s in shards for ids in s["token_ids"].to_pylist()),
            "mean_reward": means,
        }

    def _completion(self, sampled: Sampled, i: int) -> Completion:
        sample, ready, config = sampled.samples[i], sampled.ready, self.config
        settings = [config.engine, config.temperature, config.top_p, config.max_tokens, config.seed, config.dtype]
        return Completion(
            completion_id=content_id(ready.prompt.prompt_id, self.policy.id, settings, sample.sample_index),
            prompt_id=ready.prompt.prompt_id,
            sample_index=sample.sample_index,
            text=self.chat.decode(sample.token_ids),
            prompt_token_ids=ready.token_ids,
            token_ids=sample.token_ids,
            finish_reason=sample.finish_reason,
            policy=self.policy.id,
            ids_digest=ids_digest(ready.token_ids, sample.token_ids),
        )

    def _references(self, completions: list[Completion], sampled: list[Sampled], engine: Engine) -> list[RefLogps]:
        """Captured while sampling when the policy is the reference; else one scoring pass with the adapter off."""
        if self.reference == self.policy.id:
            logps = [sample.token_logps for s in sampled for sample in s.samples]
        else:
            given = [Sequence(c.completion_id, c.prompt_token_ids, c.token_ids) for c in completions]
            scored = dict(engine.score(given, adapter=False))
            logps = [scored[c.completion_id] for c in completions]
        assert self.reference is not None
        return [
            RefLogps(c.completion_id, self.reference, engine.scorer, c.ids_digest, values, sum(values), len(values))
            for c, values in zip(completions, logps, strict=True)
        ]


def _reward_folder(name: str) -> str:
    return f"rewards/{name}"
