"""Stage 3, `prefpipe train`: pairs with cached reference log-probs -> a LoRA adapter. One model is in memory."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from peft import PeftModel

from prefpipe import chat as chats
from prefpipe import fingerprint, fsio, ingest, log, models, store
from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError, IdentityError, UsageError
from prefpipe.forward import load
from prefpipe.forward.layout import Tree
from prefpipe.forward.logps import score, self_test
from prefpipe.ids import ids_digest
from prefpipe.models import Policy
from prefpipe.schemas import Dropped, Pair, RefLogps, from_table, to_table
from prefpipe.store import Manifest, Run
from prefpipe.train import audit, checkpoint, loop
from prefpipe.train.checkpoint import Checkpoint
from prefpipe.train.groups import TrainPair
from prefpipe.train.losses import LOSSES
from prefpipe.train.optimizer import MasterAdamW

_SELF_TEST_LIMIT = {"float32": 1e-3, "float16": 0.5, "bfloat16": 1.0}  # nats in one token; a wrong mask is off by many


def run(config: TrainConfig, out: Path, *, force: bool) -> Manifest:
    """Read pairs, prove that the cache belongs to the model, train from the newest checkpoint, save the adapter."""
    if not config.pairs:
        raise UsageError("no pairs given", "pass --pairs DIR (a run of prefpipe build-pairs) or a .jsonl file")
    sources = [Path(source) for source in config.pairs]
    inputs = {f"pairs.{i}": store.input_digest(path) for i, path in enumerate(sources)}
    policy = models.resolve(config.model, config.adapter)
    chat = chats.load(policy.directory, config.chat_template) if any(s.is_file() for s in sources) else None
    inputs |= {"policy": policy.id, **(chat.digests if chat else {})}
    with store.open_run(out, "train", config, inputs, force=force) as run_:
        manifest = run_.manifest()
        if manifest is not None:
            log.info(f"{out} is complete already")
            return manifest
        rows, dropped = _read(sources, chat)
        run_.write_dropped(Dropped, to_table(Dropped, dropped))
        reference = _reference(rows, policy, config)
        model = _load(policy, config)
        pairs = [_to_train_pair(row) for row in rows]
        _self_test(model, pairs, config.dtype)
        found = None
        if any(LOSSES[name].needs_reference for name in config.loss_type):
            pairs, scorers = _with_references(run_, pairs, rows, model, config.dtype, policy)
            found = _audit(model, pairs, scorers, config, base_is_reference=reference == policy.base_id != policy.id)
        last = _train(run_, model, pairs, config)
        adapter = out / "adapter"
        if not adapter.exists():
            fsio.publish_dir(adapter, lambda into: _save(model, into, policy, config.model))
        trained = fingerprint.policy_id(policy.weights, fingerprint.adapter_digest(adapter))
        totals = {"pairs": len(pairs), "steps": loop.num_steps(len(pairs), config), "last_step": last}
        totals |= {"dropped": len(dropped), "audit": found.to_dict() if found else None}
        return run_.finish(totals, {"policy": trained, "initial": policy.id, "reference": reference})


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


def _load(policy: Policy, config: TrainConfig) -> PeftModel:
    log.info(f"loading {policy.directory.name} ({config.dtype})")
    base = load.load_model(policy.directory, config.dtype)
    if policy.adapter is not None:
        return load.load_adapter(base, policy.adapter, trainable=True)
    return load.add_lora(
        base, r=config.lora_r, alpha=config.lora_alpha, target_modules=config.lora_target_modules, seed=config.seed
    )


def _self_test(model: PeftModel, pairs: Sequence[TrainPair], dtype: str) -> None:
    """Token trees against transformers' own forward on two short pairs: an unsupported architecture shows here."""
    short = sorted(pairs, key=lambda p: len(p.prompt) + len(p.chosen) + len(p.rejected))[:2]
    difference = self_test(model, [Tree(p.prompt, (p.chosen, p.rejected)) for p in short])
    if not difference <= _SELF_TEST_LIMIT[dtype]:
        raise UsageError(
            f"token trees and plain forward passes of this model differ by {difference:.3g} nats in one token",
            "this architecture is not supported yet; please report it",
        )


def _with_references(
    run_: Run, pairs: list[TrainPair], rows: Sequence[Pair], model: PeftModel, dtype: str, policy: Policy
) -> tuple[list[TrainPair], set[str]]:
    """Fill missing reference values from the initial policy, before step 0, and keep them as a cache in OUT."""
    scorers = {row.scorer for row in rows if row.scorer is not None}
    missing = [p for p in pairs if p.ref_chosen is None or p.ref_rejected is None]
    if not missing:
        return pairs, scorers
    if not run_.has_part("ref_logps", 0):
        log.info(
            f"{len(missing)} of {len(pairs)} pairs have no reference log-probs: scoring them with the initial policy"
        )
        run_.write_part("ref_logps", RefLogps, 0, to_table(RefLogps, _score_missing(missing, model, dtype, policy)))
    cached = {r.completion_id: r for r in from_table(RefLogps, run_.read_part("ref_logps", RefLogps, 0))}
    filled = [
        p
        if p.ref_chosen is not None and p.ref_rejected is not None
        else replace(
            p, ref_chosen=tuple(cached[p.chosen_id].token_logps), ref_rejected=tuple(cached[p.rejected_id].token_logps)
        )
        for p in pairs
    ]
    return filled, scorers | {r.scorer for r in cached.values()}


def _score_missing(pairs: Sequence[TrainPair], model: PeftModel, dtype: str, policy: Policy) -> list[RefLogps]:
    found: dict[str, RefLogps] = {}
    with log.progress("reference log-probs", len(pairs), "pairs") as advance:
        for p in pairs:
            (values,) = score(model, [Tree(p.prompt, (p.chosen, p.rejected))])
            for key, ids, logps in ((p.chosen_id, p.chosen, values[0]), (p.rejected_id, p.rejected, values[1])):
                digest = ids_digest(p.prompt, ids)
                found[key] = RefLogps(key, policy.id, load.scorer_name(dtype), digest, logps, sum(logps), len(logps))
            advance(1)
    return list(found.values())


def _audit(
    model: PeftModel, pairs: Sequence[TrainPair], scorers: set[str], config: TrainConfig, *, base_is_reference: bool
) -> audit.Audit:
    with load.adapter_off(model, off=base_is_reference):
        found = audit.audit(pairs, config.audit_rows, lambda trees: score(model, trees), config.beta)
    full = config.dtype == "float32" and all(s.endswith("/float32") for s in scorers)
    audit.check(found, exact=scorers == {load.scorer_name("float32")} and full, full_precision=full)
    log.info(
        f"audit: {found.pairs} pairs re-scored, {found.signed_mean:+.4f} signed and {found.absolute_mean:.4f} absolute "
        f"nats per token, step-0 loss {found.loss:.4f} (ln 2 = 0.6931): the cache belongs to this model"
    )
    return found


def _train(run_: Run, model: PeftModel, pairs: Sequence[TrainPair], config: TrainConfig) -> dict[str, float]:
    """Run the loop from the newest checkpoint; returns the metrics of the last step."""
    optimizer = MasterAdamW(model, config.weight_decay)
    folder, metrics = run_.out / "checkpoints", run_.out / "metrics.jsonl"
    resumed = checkpoint.newest(folder, run_.fingerprint)
    if resumed is not None:
        optimizer.load_state(resumed.tensors)
        log.info(f"resuming after step {resumed.step}")
    first = resumed.step if resumed else 0
    fsio.truncate(metrics, resumed.metrics_bytes if resumed else 0)
    start = fsio.monotonic()
    total = loop.num_steps(len(pairs), config)
    with log.progress("training", total, "steps") as advance:
        advance(first)
        for step in loop.steps(model, optimizer, pairs, config, first):
            fsio.append_line(metrics, json.dumps({"step": step.step, **step.values}))
            advance(1)
            done = step.step + 1
            if done % config.save_steps == 0 or done == total:
                fsio.sync_file(metrics)  # the checkpoint vouches for its size
                state = Checkpoint(done, metrics.stat().st_size, optimizer.state())
                checkpoint.save(folder, state, run_.fingerprint)
    run_.log_timing(event="trained", steps=total - first, seconds=round(fsio.monotonic() - start, 3))
    *_, last = metrics.read_text(encoding="utf-8").splitlines()
    return json.loads(last)


def _save(model: PeftModel, into: Path, policy: Policy, base_name: str) -> None:
    load.save_adapter(model, into, base_name)
    (into / "prefpipe.json").write_text(models.adapter_base_record(policy.weights), encoding="utf-8")


def _to_train_pair(row: Pair) -> TrainPair:
    def optional(values: list[float] | None) -> tuple[float, ...] | None:
        return None if values is None else tuple(values)

    return TrainPair(
        row.pair_id, row.chosen_completion_id, row.rejected_completion_id, tuple(row.prompt_token_ids),
        tuple(row.chosen_token_ids), tuple(row.rejected_token_ids), optional(row.ref_chosen_token_logps),
        optional(row.ref_rejected_token_logps), row.weight,
    )  # fmt: skip
