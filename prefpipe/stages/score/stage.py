"""Reference log-probs and rewards for completions, pairs or labels that exist already.

    prefpipe score stages/score/pairs.toml --out DIR

1. Read policy, chat template and rewards, and identify them and every input by its content.
2. Open DIR; a run that is complete stays as it is.
3. Read, score and rate every shard that is not committed yet; commit each when it is whole.
4. Gather the ledger, and count over all shards.
5. Score `check` random completions again with the other engine: parity.json.
6. Write the id of the reference and the tokens, and the manifest.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from prefpipe import clock, log
from prefpipe.config.score import ScoreConfig
from prefpipe.engines.base import EngineSettings, ScoreRequest
from prefpipe.errors import UsageError
from prefpipe.ids import IdSet
from prefpipe.inference import parity, scoring, task
from prefpipe.inference.cutting import part_of
from prefpipe.inference.inflight import Inflight
from prefpipe.inference.pool import open_pool
from prefpipe.inference.pool_size import Needs, Size, size_of
from prefpipe.inference.works import Part, Rating, Rewards, Scoring, write
from prefpipe.inputs import files, hub
from prefpipe.inputs.tokenised import Limits
from prefpipe.models import vocabulary
from prefpipe.models.chat import Chat
from prefpipe.models.encoding import Rules
from prefpipe.models.notices import check_ends
from prefpipe.models.policy import Policy, context_length, resolve
from prefpipe.rewards import rating
from prefpipe.runs import store
from prefpipe.runs.resume import ROWS, RowInputs
from prefpipe.runs.settled import settled
from prefpipe.runs.store import Manifest, Run
from prefpipe.runs.tables import among
from prefpipe.schemas import Completion, Dropped, RefLogps, from_table, to_table
from prefpipe.stages.score import output as outputs
from prefpipe.stages.score import sources
from prefpipe.stages.score.imports import Known
from prefpipe.stages.score.output import OutputShard
from prefpipe.stages.score.sources import Reader


def run(config: ScoreConfig, out: Path, *, force: bool) -> Manifest:
    """Score and rate every row that has no committed shard yet, a shard at a time."""
    if not config.inputs:
        raise UsageError("no inputs given", "pass --inputs: a run directory, a file of rows, or hf:OWNER/NAME")
    config = settled(config, out)
    policy = resolve(config.model, config.adapter)
    columns = files.renames(config.column)
    foreign = [source for source in config.inputs if not files.is_run(source)]
    state = files.state(foreign)
    for source in foreign if force or not (out / "manifest.json").exists() else ():  # a complete run read them all
        sources.check_format(source, columns)
    chat = task.read_chat(config, policy)
    sources.check_share(config.inputs, config.share)
    number, count = part_of(config.part)
    config = config.model_copy(update={"max_length": _longest(config, policy)})
    reference = policy.id if config.reference == "policy" else None
    rewards, reward_ids = rating.load_rewards(config.rewards, config.reward_settings)
    inputs = _identities(config.inputs, reference, chat, reward_ids)

    def shards(saved: Mapping[str, Any], known: Known) -> Iterator[OutputShard]:
        size, rates = saved["shard_rows"], bool(rewards)
        limits = Limits(config.max_prompt_length, config.max_length, config.overlong, Rules.of(config))
        reader = Reader(chat, limits, size, columns, config.reward_on, rates, known, config.share, config.seed)
        return _shards(config, reader, list(rewards))

    by_row = RowInputs(
        _mendable(config.inputs), lambda saved: (s.rows[ROWS] for s in shards(saved, defaultdict(IdSet)))
    )
    with store.open_run(out, "score", config, inputs, force=force, by_row=by_row) as output:
        manifest = output.manifest()
        if manifest is not None:
            return manifest
        known: Known = defaultdict(IdSet)
        own = outputs.of_part(shards(output.saved, known), number, count)
        missing = outputs.missing(own, output, known)
        settings = EngineSettings.of(config, policy, chat, top_p=1.0, max_tokens=1, max_model_len=config.max_length)
        _fill(missing, config, settings, reference, output, Rewards(rewards, config.reward_settings))
        if files.state(foreign) != state:
            raise files.changed(", ".join(foreign))
        output.gather_dropped(Dropped, to_table(Dropped, []))
        totals = outputs.totals(output, rewards, may_be_empty=config.share < 1 or count > 1)
        if config.check and reference:
            own = islice(shards(output.saved, known), number - 1, None, count)
            totals["parity"] = _check(config, output, own, settings)
            output.write_report("parity.json", totals["parity"])
        tokens = vocabulary.record(vocabulary.of_sources(config.inputs, chat.tokenizer))
        return output.finish(totals, {"reference": reference, **tokens}, outputs.balances(output))


def summary(manifest: Manifest, out: Path) -> list[str]:
    """What the command prints when it is done."""
    t = manifest["totals"]
    parts = ", ".join(f"{count} {name}" for name, count in t["rows"].items() if count)
    lines = [f"{parts or 'rewards'} in {out}"]
    if t["tokens"]:
        lines.append(f"  reference log-probs: {t['tokens']} tokens, mean {t['mean_token_logp']:.4f} nats")
    lines += rating.summary(t)
    if t["dropped"]:
        lines.append(f"  dropped: {', '.join(f'{reason}: {count}' for reason, count in t['dropped'].items())}")
    return [*lines, *(parity.table(t["parity"]) if "parity" in t else [])]


def _longest(config: ScoreConfig, policy: Policy) -> int:
    """max_length inside the model's context; one token less, which vLLM's scoring asks for."""
    context = context_length(policy.directory)
    if context is not None and config.max_length > context - 1:
        log.info(f"max_length is {context - 1}: the model's context is {context} tokens")
        return context - 1
    return config.max_length


def _identities(
    inputs: Sequence[str], reference: str | None, chat: Chat, reward_ids: Mapping[str, str]
) -> dict[str, str]:
    """What the results depend on, by name; the chat template only where texts are tokenised."""
    runs = [Path(source) for source in inputs if files.is_run(source)]
    identities = {f"inputs.{i}": files.digest(source) for i, source in enumerate(inputs)} | dict(reward_ids)
    if reference:
        identities["reference"] = reference
    if len(runs) < len(inputs):
        check_ends(chat)
        identities |= chat.digests
    for source in runs:
        sources.notice_other_chat(source, chat)
    return identities


def _mendable(inputs: Sequence[str]) -> list[str]:
    """The names of the inputs that may change between two starts: files. A dataset of the hub has no digest, and beside
    one no input may: its rows would have to be read once more to number the shards."""
    if any(map(hub.is_hub, inputs)):
        return []
    return [f"inputs.{i}" for i, source in enumerate(inputs) if not files.is_run(source)]


def _shards(config: ScoreConfig, reader: Reader, reward_names: Sequence[str]) -> Iterator[OutputShard]:
    """The shards of all inputs, numbered. Nothing is tokenised before its shard is read."""
    shards = chain.from_iterable(sources.shards(source, reader) for source in config.inputs)
    return outputs.numbered(shards, reward_names, scored=config.reference == "policy")


def _fill(
    missing: Iterator[OutputShard],
    config: ScoreConfig,
    settings: EngineSettings,
    reference: str | None,
    output: Run,
    rewards: Rewards,
) -> None:
    """Read, score, rate and commit the missing shards."""
    inflight = Inflight.load(output.out)
    first = next(missing, None)
    if first is not None:
        start = clock.monotonic()
        finish = partial(_parts, reference, rewards)
        work = Scoring(_without, _to_score, finish) if reference else Rating(finish)
        with (
            open_pool(
                config.engine, settings if reference else None, _size(config, settings, scored=bool(reference))
            ) as pool,
            log.progress("scoring", _expected(config) if reference else None, "rows") as advance,
        ):
            contents = ((shard.index, shard.holding(shard.read())) for shard in chain([first], missing))
            scored = 0
            for whole in pool.run(work, contents, inflight, advance, scoring.last_suspect(inflight)):
                scored += write(output, whole)
        output.log_timing(event="scored", rows=scored, seconds=round(clock.monotonic() - start, 3))
    inflight.close()


def _size(config: ScoreConfig, settings: EngineSettings, *, scored: bool) -> Size:
    """How many workers. Nobody knows how many shards a file has before it is read."""
    runs = [store.read_manifest(Path(source)) for source in config.inputs if files.is_run(source)]
    counted = len(runs) == len(config.inputs)
    shards = sum(1 for run in runs for name in run["files"] if name.endswith(".parquet")) if counted else 1
    needs = Needs(shards, config.tensor_parallel_size, config.kv_cache_mib << 20, config.dtype)
    return size_of(config.workers, config.cluster, config.engine, settings.policy if scored else None, needs)


def _without(shard: OutputShard, killers: Collection[str]) -> OutputShard:
    return shard.holding(sources.without(shard.read(), killers))


def _to_score(shard: OutputShard) -> Sequence[ScoreRequest]:
    return shard.read().requests


def _parts(
    reference: str | None, rewards: Rewards, _index: int, shard: OutputShard, values: scoring.Values, scorer: str
) -> list[Part]:
    rows = shard.read()
    scored = scoring.rows_of(rows.requests, values, reference, scorer) if reference else []
    logps = {row.completion_id: row for row in scored}
    return outputs.parts(rewards.functions, shard, rows, logps)


def _expected(config: ScoreConfig) -> float | None:
    """Completions to score, for the progress bar; None unless every input is a run of generate, which counts them."""
    if not all(Path(source).is_dir() for source in config.inputs):
        return None
    manifests = [store.read_manifest(Path(source)) for source in config.inputs]
    counted = all(manifest["command"] == "generate" for manifest in manifests)
    _, count = part_of(config.part)
    return sum(manifest["totals"]["completions"] for manifest in manifests) / count if counted else None


def _check(config: ScoreConfig, output: Run, shards: Iterable[OutputShard], settings: EngineSettings) -> dict[str, Any]:
    """Score random completions again with the other engine."""
    ids = (key for part in outputs.column(output, "ref_logps", RefLogps, "completion_id") for key in part)
    picked = parity.pick(ids, config.check, config.seed)
    logps: dict[str, RefLogps] = {}
    for index in output.parts("ref_logps"):
        rows = from_table(RefLogps, among(output.read_part("ref_logps", RefLogps, index), sorted(picked)))
        logps |= {row.completion_id: row for row in rows}
    requests = {r.completion_id: r for shard in shards for r in _requests(shard, output) if r.completion_id in picked}
    cached = [parity.CachedLogps(requests[key], logps[key].token_logps) for key in sorted(picked)]
    scorer = next(iter(logps.values())).scorer if logps else ""
    return parity.check(cached, config.engine, scorer, settings, adapter=True)


def _requests(shard: OutputShard, output: Run) -> Iterable[ScoreRequest]:
    """The completions of a committed shard; imported ones as they were written: nothing is tokenised twice."""
    if "completions" not in shard.datasets:
        return shard.read().requests
    return map(scoring.request_of, from_table(Completion, output.read_part("completions", Completion, shard.index)))
