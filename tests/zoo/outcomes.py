"""What `prefpipe score` and `prefpipe train` make of a model, compared with a plain forward pass of transformers."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from tests.forge import Ended

TOLERANCE = 1e-4  # nats in one token, float32
_REFUSALS = (2, 65, 66)  # exit codes of what is wrong with a model
_SEPARATE = re.compile(r"warning: every completion is (?:scored|computed) in a row of its own[^:]*: (.*)")
_ROWS = [
    {"prompt": [{"role": "user", "content": ask}], "chosen": [{"role": "assistant", "content": chosen}],
     "rejected": [{"role": "assistant", "content": rejected}]}
    for ask, chosen, rejected in (
        ("What is the capital of France?", "It is Paris, a city on the Seine.", "It is Paris, or not."),
        ("Name a town by the sea.", "Hull.", "I do not know of any town that lies by the sea."),
    )
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a model is computed, "shared" or "separate", and why; or "refused", with the two lines of the error; else
    "different" or "crash", with what happened; "not tried" where there is no model."""

    kind: str
    reason: str = ""
    hint: str = ""


def outcome(model: Path, work: Path, call: Callable[..., Ended]) -> Outcome:
    """Score two pairs and train two steps of DPO with LoRA on them, by the command line."""
    work.mkdir(parents=True, exist_ok=True)
    rows, scored, trained = work / "rows.jsonl", work / "scored", work / "trained"
    rows.write_text("".join(json.dumps(row) + "\n" for row in _ROWS), encoding="utf-8")
    template = "model" if _has_template(model) else "none"
    common = ("--model", model, "--dtype", "float32", "--chat-template", template)
    lengths = ("--max-prompt-length", 4000, "--max-length", 4096)
    done = call(
        *("score", *common, "--inputs", rows, "--engine", "transformers", "--check", 0, *lengths),
        *("--out", scored),
    )
    if done.code:
        return _failure(done, model)
    pairs = [row for file in sorted(scored.glob("pairs/*.parquet")) for row in pq.read_table(file).to_pylist()]
    worst, foresight = _differences(model, pairs)
    if foresight > TOLERANCE:
        return Outcome("different", f"a token changes the log-probs of those before it by {foresight:.3g} nats")
    if len(pairs) != len(_ROWS) or not worst <= TOLERANCE:
        return Outcome("different", f"{len(pairs)} pairs, log-probs differ by up to {worst:.3g} nats in one token")
    done = call(
        *("train", *common, "--pairs", scored, "--lora-r", 4, "--train-batch-size", 1, "--out", trained),
        *("--max-tokens-per-micro-batch", 4096, "--gradient-checkpointing", "off"),
    )
    if done.code:
        return _failure(done, model)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    if len(losses) != 2 or not all(map(math.isfinite, losses)) or abs(losses[0] - math.log(2)) > TOLERANCE:
        return Outcome("different", f"losses {losses}")
    separate = _SEPARATE.search(done.stderr)
    return Outcome("separate", in_general(separate[1].partition("; ")[0])) if separate else Outcome("shared")


def in_general(reason: str) -> str:
    """The first sentence of a reason, without numbers that are others on another CPU."""
    return re.sub(r" by [\d.e+-]+ nats in one token", "", reason).partition(". ")[0].replace("|", "/")


def _has_template(model: Path) -> bool:
    settings = model / "tokenizer_config.json"
    listed = settings.is_file() and "chat_template" in json.loads(settings.read_text(encoding="utf-8"))
    return listed or (model / "chat_template.jinja").is_file()


def _failure(done: Ended, model: Path) -> Outcome:
    lines = dict(line.split(": ", 1) for line in done.stderr.splitlines() if line.startswith(("error: ", "hint: ")))
    message, hint = (lines.get(name, "").replace(str(model), "MODEL").strip() for name in ("error", "hint"))
    kind = "refused" if done.code in _REFUSALS and message and hint else "crash"
    return Outcome(kind, in_general(message) or done.stderr[-300:], hint)


@torch.no_grad()
def _differences(directory: Path, pairs: list[dict[str, Any]]) -> tuple[float, float]:
    """Two largest differences in nats of a token: between cached log-probs and those of full logits, one row at a time,
    by eager attention; and of the latter, when the last token of the row is another one."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    )
    logging.set_verbosity(before)
    cached, ahead = [0.0], [0.0]
    for pair in pairs:
        for side in ("chosen", "rejected"):
            prompt, ids = pair["prompt_token_ids"], pair[f"{side}_token_ids"]
            plain = _plain(model, prompt, ids)
            cached.append(float((plain - torch.tensor(pair[f"ref_{side}_token_logps"])).abs().max()))
            other = _plain(model, prompt, [*ids[:-1], ids[0]])
            ahead.append(float((plain - other)[:-1].abs().max()))
    return max(cached) if all(map(math.isfinite, cached)) else math.nan, max(ahead)


def _plain(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)
