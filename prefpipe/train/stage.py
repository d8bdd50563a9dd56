"""Stage 3, `prefpipe train`: pairs with cached reference log-probs -> a LoRA adapter. One model is in memory."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from prefpipe import chat as chats
from prefpipe import fingerprint, fsio, ingest, log, models, store
from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError, IdentityError, UsageError
from prefpipe.forward import load
from prefpipe.forward.layout import Tree
from prefpipe.forward.logps import TreeModel, score, settle_rows
from prefpipe.ids import ids_digest
from prefpipe.models import Policy
from prefpipe.schemas import Dropped, Pair, RefLogps, from_table, to_table
from prefpipe.store import Manifest, Run
from prefpipe.train import audit, checkpoint, loop, memory, parallel
from prefpipe.train.checkpoint import Checkpoint
from prefpipe.train.groups import TrainPair
from prefpipe.train.loop import StepMetrics, Trainer
from prefpipe.train.losses import LOSSES
from prefpipe.train.optimizer import MasterAdamW
from prefpipe.train.parallel import World


@dataclass(frozen=True)
class Job:
    """What a run trains on: checked rows, dropped ones, where it starts, which reference, what identifies it."""

    rows: list[Pair]
    dropped: list[Dropped]
    policy: Policy
    reference: str | None
    inputs: dict[str, str]


def run(config: TrainConfig, out: Path, *, force: bool) -> Manifest:
    """Read pairs, prove that the cache belongs to the model, train from the newest checkpoint, save the adapter."""
    world = parallel.start()
    job = prepare(config)
    opened = store.open_run(out, "train", config, job.inputs, force=force) if world.leads else nullcontext(None)
    with opened as run_:
        manifest = world.tell(run_.manifest() if run_ else None)
        if manifest is not None:
            log.info(f"{out} is complete already")
        else:
            manifest = _run(run_, world, job, config)
    parallel.stop(world)  # after an error the process just ends: leaving the group would wait for the other ranks
    return manifest


def prepare(config: TrainConfig) -> Job:
    """Read and check everything that training needs, without loading a model."""
    if not config.pairs:
        raise UsageError("no pairs given", "pass --pairs DIR (a run of prefpipe build-pairs) or a .jsonl file")
    sources = [Path(source) for source in config.pairs]
    inputs = {f"pairs.{i}": store.input_digest(path) for i, path in enumerate(sources)}
    policy = models.resolve(config.model, config.adapter)
    chat = chats.load(policy.directory, config.chat_template) if any(s.is_file() for s in sources) else None
    rows, dropped = _read(sources, chat)
    inputs |= {"policy": policy.id, **(chat.digests if chat else {})}
    return Job(rows, dropped, policy, _reference(rows, policy, config), inputs)


def _run(run_: Run | None, world: World, job: Job, config: TrainConfig) -> Manifest:
    """`run_` is the output directory, held by rank 0 only."""
    if run_:
        run_.write_dropped(Dropped, to_table(Dropped, job.dropped))
    model = load_policy(job.policy, config)
    pairs = to_train_pairs(job.rows)
    choose_rows(model, pairs, config.dtype)
    found = None
    for pair in pairs:
        audit.check_lengths(pair)
    if any(LOSSES[name].needs_reference for name in config.loss_type):
        base_is_reference = job.reference == job.policy.base_id != job.policy.id
        # A new adapter changes nothing yet, but it costs time: it is off too while the base is scored.
        with load.adapter_off(model.policy, off=job.reference == job.policy.base_id):
            pairs, scorers = _with_references(run_, world, pairs, job, model, config.dtype)
        found = _audit(model, pairs, scorers, config, base_is_reference=base_is_reference)
    tokens = world.tell(config.max_tokens_per_micro_batch or fitting_tokens(model, pairs))
    wrapped = parallel.wrap(model, world, config.distributed)
    optimizer = MasterAdamW(wrapped, config.weight_decay)
    trainer = Trainer(model, wrapped, optimizer, config, world, tokens)
    last = _train(run_, trainer, pairs)
    adapter = parallel.whole_adapter(model.policy)
    manifest = None
    if run_:
        manifest = _finish(run_, job, pairs, model, adapter, config, {"last_step": last, "audit": found})
    return cast(Manifest, world.tell(manifest))


def _finish(
    run_: Run, job: Job, pairs: Sequence[TrainPair], model: TreeModel, adapter: dict[str, torch.Tensor],
    config: TrainConfig, results: dict[str, Any],
) -> Manifest:  # fmt: skip
    """Save the adapter and the manifest."""
    target, policy = run_.out / "adapter", job.policy
    if not target.exists():
        fsio.publish_dir(target, lambda into: _save(model, adapter, into, policy, config.model))
    trained = fingerprint.policy_id(policy.weights, fingerprint.adapter_digest(target))
    totals = {"pairs": len(pairs), "steps": loop.num_steps(len(pairs), config), "dropped": len(job.dropped), **results}
    return run_.finish(totals, {"policy": trained, "initial": policy.id, "reference": job.reference})


def summary(manifest: Manifest, out: Path) -> list[str]:
    """What the command prints when it is done."""
    t = manifest["totals"]
    shown = ", ".join(
        f"{k} {v:.4g}" for k, v in t["last_step"].items() if k in ("loss", "rewards/margins", "grad_norm")
    )
    return [f"trained on {t['pairs']} pairs in {t['steps']} steps: {out}/adapter", f"  last step: {shown}"]


def _read(sources: Sequence[Path], chat: chats.Chat | None) -> tuple[list[Pair], list[Dropped]]:
    """Pairs of all sources; every row's ids are checked against its digest."""
    pairs: list[Pair] = []
    dropped: list[Dropped] = []
    for source in sources:
        if source.is_dir():
            pairs += from_table(Pair, store.read_dataset(source, "pairs", Pair))
        else:
            assert chat is not None
            own, faulty = ingest.read_pairs(source, chat)
            pairs, dropped = pairs + own, dropped + faulty
    for pair in pairs:
        for ids, digest in (
            (pair.chosen_token_ids, pair.chosen_ids_digest),
            (pair.rejected_token_ids, pair.rejected_ids_digest),
        ):
            if ids_digest(pair.prompt_token_ids, ids) != digest:
                raise IdentityError(
                    f"pair {pair.pair_id}: its token ids are not those that its log-probs were computed for",
                    "rows were edited or shuffled: make the pairs again with `prefpipe build-pairs`",
                )
    return pairs, dropped


def _reference(rows: Sequence[Pair], policy: Policy, config: TrainConfig) -> str | None:
    """The reference of the cached values; refuses values of a model that cannot be checked here."""
    named = sorted({row.reference for row in rows if row.reference is not None})
    if not any(LOSSES[name].needs_reference for name in config.loss_type):
        return None
    if len(named) > 1:
        raise DataError(
            f"the pairs hold log-probs of {len(named)} references: {', '.join(named)}", "train on one at a time"
        )
    if named and named[0] not in (policy.id, policy.base_id):
        theirs, ours = dict(p.split(":") for p in named[0].split("+")), dict(p.split(":") for p in policy.id.split("+"))
        differing = [k for k in ("weights", "adapter") if theirs.get(k) != ours.get(k)]
        raise IdentityError(
            f"the cached reference log-probs were made by {named[0]}, but training starts from {policy.id} "
            f"(different: {', '.join(differing)})",
            "pass the --model and --adapter that made them, or generate again with this model",
        )
    return named[0] if named else policy.id


def load_policy(policy: Policy, config: TrainConfig) -> TreeModel:
    """The one model of a run: the base with a new adapter, or with the one it continues."""
    log.info(f"loading {policy.directory.name} ({config.dtype})")
    base = load.load_model(policy.directory, config.dtype)
    if policy.adapter is not None:
        return TreeModel(load.load_adapter(base, policy.adapter, trainable=True))
    return TreeModel(
        load.add_lora(
            base, r=config.lora_r, alpha=config.lora_alpha, target_modules=config.lora_target_modules, seed=config.seed
        )
    )


def choose_rows(model: TreeModel, pairs: Sequence[TrainPair], dtype: str) -> None:
    """Token trees against transformers' own forward on the shortest and the longest pair: windows and length-dependent
    positions show in the longest. Separate rows, with a notice, where they fail."""
    shortest, *_, longest = sorted([*pairs, pairs[0]], key=lambda p: tree_of(p).num_tokens)
    reason = settle_rows(model, [tree_of(shortest), tree_of(longest)], dtype)
    if reason is not None:
        log.warn(f"every completion is computed in a row of its own, at up to twice the cost: {reason}")


def tree_of(pair: TrainPair) -> Tree:
    """A pair as a tree of two completions."""
    return Tree(pair.prompt, (pair.chosen, pair.rejected))


def fitting_tokens(model: TreeModel, pairs: Sequence[TrainPair]) -> int:
    """The token budget that the free memory allows, from a probe on the data."""
    trees = [tree_of(p) for p in pairs]
    footprint = memory.measure(model, trees)
    device = next(model.parameters()).device
    tokens = memory.budget(footprint, device, memory.free_bytes(device), max(tree.num_tokens for tree in trees))
    log.info(f"micro-batches of up to {tokens} tokens ({footprint.activations_per_token / 1024:.0f} KiB per token)")
    return tokens


def _with_references(
    run_: Run | None, world: World, pairs: list[TrainPair], job: Job, model: TreeModel, dtype: str
) -> tuple[list[TrainPair], set[str]]:
    """Fill missing reference values from the initial policy, before step 0, and keep them as a cache in OUT."""
    scorers = {row.scorer for row in job.rows if row.scorer is not None}
    missing = [p for p in pairs if p.ref_chosen is None or p.ref_rejected is None]
    if not missing:
        return pairs, scorers
    if not world.tell(run_.has_part("ref_logps", 0) if run_ else False):
        log.info(f"{len(missing)} of {len(pairs)} pairs have no reference log-probs: they are scored once, now")
        rows = _score_missing(missing[world.rank :: world.size], model, dtype, job.reference or job.policy.id)
        found = {r.completion_id: r for share in world.gather(rows) for r in share}
        if run_:
            run_.write_part("ref_logps", RefLogps, 0, to_table(RefLogps, [found[key] for key in sorted(found)]))
    cached = world.tell(_cached(run_))
    filled = [
        p
        if p.ref_chosen is not None and p.ref_rejected is not None
        else replace(p, ref_chosen=cached[p.chosen_id], ref_rejected=cached[p.rejected_id])
        for p in pairs
    ]
    return filled, scorers | {load.scorer_name(dtype)}


def _cached(run_: Run | None) -> dict[str, tuple[float, ...]]:
    if run_ is None:
        return {}
    rows = from_table(RefLogps, run_.read_part("ref_logps", RefLogps, 0))
    return {r.completion_id: tuple(r.token_logps) for r in rows}


def _score_missing(pairs: Sequence[TrainPair], model: TreeModel, dtype: str, reference: str) -> list[RefLogps]:
    """This rank's share, prompts together, so that each is computed once."""
    found: dict[str, RefLogps] = {}
    ordered = sorted(pairs, key=lambda p: p.prompt)
    with log.progress("reference log-probs", len(pairs), "pairs") as advance:
        for p, values in zip(ordered, score(model, map(tree_of, ordered)), strict=True):
            for key, ids, logps in ((p.chosen_id, p.chosen, values[0]), (p.rejected_id, p.rejected, values[1])):
                digest = ids_digest(p.prompt, ids)
                found[key] = RefLogps(key, reference, load.scorer_name(dtype), digest, logps, sum(logps), len(logps))
            advance(1)
    return list(found.values())


def _audit(
    model: TreeModel, pairs: Sequence[TrainPair], scorers: set[str], config: TrainConfig, *, base_is_reference: bool
) -> dict[str, float]:
    with load.adapter_off(model.policy, off=base_is_reference):
        found = audit.audit(pairs, config.audit_rows, lambda trees: list(score(model, trees)), config.beta)
    full = config.dtype == "float32" and all(s.endswith("/float32") for s in scorers)
    audit.check(found, exact=scorers == {load.scorer_name("float32")} and full, full_precision=full)
    log.info(
        f"audit: {found.pairs} pairs re-scored, {found.signed_mean:+.4f} signed and {found.absolute_mean:.4f} absolute "
        f"nats per token, step-0 loss {found.loss:.4f} (ln 2 = 0.6931): the cache belongs to this model"
    )
    return found.to_dict()


def _train(run_: Run | None, trainer: Trainer, pairs: Sequence[TrainPair]) -> dict[str, float]:
    """Run the loop from the newest checkpoint; returns the metrics of the last step (rank 0)."""
    world, config = trainer.world, trainer.config
    resumed = world.tell(checkpoint.newest(run_.out / "checkpoints", run_.fingerprint) if run_ else None)
    if resumed is not None:
        trainer.optimizer.load_state(resumed.tensors)
        log.info(f"resuming after step {resumed.step}")
    first = resumed.step if resumed else 0
    if run_:
        fsio.truncate(run_.out / "metrics.jsonl", resumed.metrics_bytes if resumed else 0)
    start = fsio.monotonic()
    total = loop.num_steps(len(pairs), config)
    with log.progress("training", total, "steps") as advance:
        advance(first)
        for step in loop.steps(trainer, pairs, first):
            done = step.step + 1
            keep = done % config.save_steps == 0 or done == total
            state = trainer.optimizer.state() if keep else None  # every rank takes part
            if run_:
                _record(run_, step, state)
            advance(1)
    if run_ is None:
        return {}
    run_.log_timing(event="trained", steps=total - first, seconds=round(fsio.monotonic() - start, 3))
    *_, last = (run_.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(last)


def _record(run_: Run, step: StepMetrics, state: dict[str, torch.Tensor] | None) -> None:
    """Append the metrics of a step and, with a state, save a checkpoint that vouches for them."""
    metrics = run_.out / "metrics.jsonl"
    fsio.append_line(metrics, json.dumps({"step": step.step, **step.values}))
    if state is not None:
        fsio.sync_file(metrics)
        done = Checkpoint(step.step + 1, metrics.stat().st_size, state)
        checkpoint.save(run_.out / "checkpoints", done, run_.fingerprint)


def _save(model: TreeModel, adapter: dict[str, torch.Tensor], into: Path, policy: Policy, base_name: str) -> None:
    name = str(policy.directory) if base_name.startswith("embedded:") else base_name
    load.save_adapter(model.policy, adapter, into, name)
    (into / "prefpipe.json").write_text(models.adapter_base_record(policy.weights), encoding="utf-8")


def to_train_pairs(rows: Sequence[Pair]) -> list[TrainPair]:
    """Rows of the dataset as what training needs of them."""

    def optional(values: list[float] | None) -> tuple[float, ...] | None:
        return None if values is None else tuple(values)

    return [
        TrainPair(
            row.pair_id, row.chosen_completion_id, row.rejected_completion_id, tuple(row.prompt_token_ids),
            tuple(row.chosen_token_ids), tuple(row.rejected_token_ids), optional(row.ref_chosen_token_logps),
            optional(row.ref_rejected_token_logps), row.weight,
        )
        for row in rows
    ]  # fmt: skip
