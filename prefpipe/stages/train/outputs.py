"""The results of a training run: an adapter or a model, and on request a merged model, each with its model card."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor

from prefpipe import __version__, log
from prefpipe.config.train import TrainConfig
from prefpipe.forward import load, merge, on_meta, tensor_files
from prefpipe.forward.logps import TreeModel, causal_model
from prefpipe.forward.weights import DTYPES
from prefpipe.models import fingerprint
from prefpipe.models.policy import Policy, adapter_base_record, merged_record
from prefpipe.runs import fsio
from prefpipe.runs.store import Run
from prefpipe.stages.train import parallel, shared_files
from prefpipe.stages.train.session import Session

FILE_BYTES = 5 * 10**9  # of tensors in a file of a saved model
_SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
_LOADERS = {
    "adapter": """from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "PATH/adapter")""",
    "model": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH/{name}")
tokenizer = AutoTokenizer.from_pretrained("PATH/{name}")""",
}


def folder_of(config: TrainConfig) -> str:
    """The folder of the trained policy in OUT: adapter/, or model/ when every weight is trained."""
    return "adapter" if config.tuning == "lora" else "model"


def save(
    session: Session, model: TreeModel, policy: Policy, config: TrainConfig, facts: Mapping[str, Any]
) -> str | None:
    """Publish the trained policy in the run directory and return its identity, on every rank. One that a killed run
    left there, which no manifest vouches for, stays only where it is the same. A collective call.

    `facts` are the contents of the model card beside the settings: counts, metrics, identities.
    """
    base = base_name(policy, config)
    fill = (
        _adapter_writer(model, policy, base)
        if config.tuning == "lora"
        else _model_writer(session, model, policy, config)
    )
    if not session.world.leads:
        fill(None)

    def publish(run: Run) -> str:
        target = run.out / folder_of(config)

        def fill_all(into: Path) -> None:
            fill(into)
            (into / "README.md").write_text(card(target.name, base, config, facts), encoding="utf-8")

        fsio.publish_dir(target, fill_all, run.out / "quarantine")
        if config.merge:
            publish_merged(run.out / "merged", run.out / "adapter", policy, config, facts, run.out / "quarantine")
        if config.tuning == "full":
            return fingerprint.policy_id(fingerprint.weights_digest(target), None)
        return fingerprint.policy_id(policy.weights, fingerprint.adapter_digest(target))

    return session.lead(publish)


Writer = Callable[[Path | None], None]  # fills a folder; the part of ranks but 0 is called with None


def _adapter_writer(model: TreeModel, policy: Policy, base: str) -> Writer:
    tensors = parallel.whole_adapter(model.policy)  # gathered: an adapter is small

    def fill(into: Path | None) -> None:
        if into is not None:
            load.save_adapter(model.policy, tensors, into, base)
            record = adapter_base_record(policy.weights, fingerprint.adapter_digest(into))
            (into / "prefpipe.json").write_text(record, encoding="utf-8")

    return fill


def _model_writer(session: Session, model: TreeModel, policy: Policy, config: TrainConfig) -> Writer:
    """Of a model that the ranks cut, each writes its rows of it, under the names of the files that it came from."""
    causal = causal_model(model.policy)
    tensors = load.model_tensors(causal)

    def fill_whole(into: Path | None) -> None:
        if into is not None:
            load.save_model(causal, tensors, into, policy.directory, config.chat_template)

    def fill_in_place(into: Path | None) -> None:
        where = on_meta.sources(policy.directory, load.empty_model(policy.directory, config.dtype))
        named = {where[name].name if name in where else name: tensor for name, tensor in tensors.items()}
        # Parameters are cut, and their shards float32; buffers are neither.
        dtypes = {name: DTYPES[config.dtype] if isinstance(t, DTensor) else t.dtype for name, t in named.items()}
        files = tensor_files.plan({n: (dtypes[n], t.shape) for n, t in named.items()}, "model", FILE_BYTES)
        shared_files.write(session.world, into, files, named)
        if into is not None:
            load.save_config(causal, into, config.dtype)
            load.save_beside_weights(into, policy.directory, config.chat_template)
            tensor_files.write_index(files, into)

    return fill_in_place if parallel.cuts(session.world, config.distributed) else fill_whole


def base_name(policy: Policy, config: TrainConfig) -> str:
    """The base model under a name that other tools load it by."""
    return str(policy.directory) if config.model.startswith("embedded:") else config.model


def publish_merged(
    target: Path, adapter: Path, policy: Policy, config: TrainConfig, facts: Mapping[str, Any], aside: Path | None
) -> None:
    """Publish a whole model: the base of `policy` plus a saved adapter, whose digest `policy` has. The base is read
    again, on the CPU: in memory it may be sharded or in 4 bits. `aside` is as in `fsio.publish_dir`."""
    log.info("merging the adapter into the model")

    def fill(into: Path) -> None:
        merge.save_merged(policy.directory, adapter, config.dtype, into)
        load.save_beside_weights(into, policy.directory, config.chat_template)
        (into / "README.md").write_text(card("merged", base_name(policy, config), config, facts), encoding="utf-8")
        record = merged_record(policy.weights, fingerprint.adapter_digest(adapter), fingerprint.weights_digest(into))
        (into / "prefpipe.json").write_text(record, encoding="utf-8")

    fsio.publish_dir(target, fill, aside)


def card(name: str, base: str, config: TrainConfig, facts: Mapping[str, Any]) -> str:
    """README.md of a saved policy, with the metadata block that model hubs read. It holds no time and no path of the
    run, so that the same run has the same card."""
    library = "peft" if name == "adapter" else "transformers"
    losses = " + ".join(f"{w:g} x {n}" for n, w in zip(config.loss_type, config.loss_weights, strict=True))
    losses += f" + {config.sft_weight:g} x NLL of {config.sft_batch_size} rows of sft" if config.sft else ""
    loader = _LOADERS["adapter" if name == "adapter" else "model"].format(base=base, name=name)
    last = facts["last_step"]
    rows = [(key, last[key]) for key in _SHOWN if key in last]
    rows += [(key, value) for key, value in last.items() if key.startswith("eval_") and key[5:] in _SHOWN]
    table = "\n".join(f"| {key} | {value:.4g} |" for key, value in rows)
    rank = f", rank {config.lora_r}, alpha {config.lora_alpha}" if config.tuning == "lora" else ""
    inputs = "\n".join(f"- {key}: `{digest}`" for key, digest in sorted(facts["inputs"].items()))
    best = facts.get("best")
    chosen = f"\nWeights of step {best['step']}, the best by {best['metric']} ({best['value']:.4g}).\n" if best else ""
    return f"""---
library_name: {library}
base_model: {base}
tags: [prefpipe, preference-optimization, {", ".join(config.loss_type)}]
---

# A policy trained with prefpipe {__version__}

Trained on {facts["count"]} {facts["kind"]}, {config.train_batch_size} in each of {facts["steps"]} steps.

- tuning: {config.tuning}{rank}
- loss: {losses}, beta {config.beta:g}
- optimizer: {config.optim}, learning rate {config.learning_rate:g}, {config.lr_scheduler_type}; seed {config.seed}
- initial policy: `{facts["initial"]}`
- reference: {f"`{facts['reference']}`" if facts["reference"] else "none (a reference-free loss)"}

## Data

{inputs}

## Metrics of the last step

| metric | value |
|---|---|
{table}
{chosen}
## Load it

```python
{loader}
```
"""
