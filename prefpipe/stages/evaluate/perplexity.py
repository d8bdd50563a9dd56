"""How well a policy predicts a fixed text: perplexity/KEY has its log-probs, window by window."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefpipe import log, reading, statistics
from prefpipe.engines.base import ScoreRequest
from prefpipe.errors import DataError
from prefpipe.ids import ids_digest
from prefpipe.inference.filling import Start
from prefpipe.inference.task import Task
from prefpipe.models.encoding import encode
from prefpipe.runs.store import Run
from prefpipe.schemas import RefLogps
from prefpipe.stages.evaluate import guards, scores
from prefpipe.stages.evaluate.answers import key
from prefpipe.stages.evaluate.baselines import Baseline

_WINDOW = 512  # tokens
_MOST_BYTES = 64 << 20
_COLUMNS = ["completion_id", "num_tokens", "ref_logps"]


@dataclass(frozen=True)
class Text:
    """A text file, and the most tokens that are scored at once."""

    file: str
    window: int
    key: str

    @property
    def dataset(self) -> str:
        """Where the log-probs stand."""
        return f"perplexity/{self.key}"


def read(file: str, max_model_len: int) -> Text:
    """A text by its path. Raises MissingInputError where there is none."""
    window = min(_WINDOW, max_model_len - 1)  # vLLM asks for one token of room
    return Text(file, window, key(reading.file_digest(Path(file)), str(window)))


def fill(run: Run, text: Text, of: Task, start: Start) -> None:
    """Score the text in windows, unless that is done. Raises DataError for a text that is too short, and as
    `reading` does."""
    if run.has_shard([text.dataset], 0):
        return
    requests = windows(encode(of.chat, reading.read_text(Path(text.file), _MOST_BYTES)), text.window)
    if not requests:
        raise DataError(f"perplexity_text = {text.file} has fewer than 2 tokens", "give a longer text")
    scores.fill(run, text.dataset, [(0, requests)], lambda: start(1), reference=of.policy.id, adapter=True)


def windows(token_ids: Sequence[int], size: int) -> list[ScoreRequest]:
    """A text in windows of at most `size` tokens. The first token of each is not scored: nothing stands before it."""
    cut = [list(token_ids[i : i + size]) for i in range(0, len(token_ids), size)]
    return [
        ScoreRequest(f"{number:06d}-{ids_digest(ids[:1], ids[1:])}", ids[:1], ids[1:])
        for number, ids in enumerate(cut)
        if len(ids) > 1
    ]


def totals(run: Run, text: Text, baselines: Sequence[Baseline]) -> dict[str, Any]:
    """Mean negative log-prob per token (nats) and its exponential, and the difference to every baseline that scored the
    same text with the same tokens.

    A drop has failed when the interval of the difference (ours - theirs) lies above 0: the text became less likely.
    """
    ours = {row["completion_id"]: row for row in run.read_part(text.dataset, RefLogps, 0, _COLUMNS).to_pylist()}
    counts = {name: float(row["num_tokens"]) for name, row in ours.items()}
    found = statistics.ratio([-row["ref_logps"] for row in ours.values()], list(counts.values()))
    drops: list[dict[str, Any]] = []
    for baseline in baselines:
        parts = baseline.parts(text.dataset, RefLogps, _COLUMNS) if baseline.has(text.dataset) else ()
        theirs = {row["completion_id"]: row["ref_logps"] for rows in parts for row in rows}
        if theirs.keys() != ours.keys():
            log.warn(f"baseline {baseline.directory} has not scored {text.file} with these tokens: not compared")
            continue
        gaps = [theirs[name] - row["ref_logps"] for name, row in ours.items()]
        difference = statistics.ratio(gaps, list(counts.values()))
        drops.append(guards.drop(baseline, difference, failed=difference.low > 0))
    return {
        "text": text.file,
        "tokens": int(sum(counts.values())),
        **found.alone("per_token"),
        "perplexity": math.exp(min(found.value, 700.0)),
        "drops": drops,
    }
