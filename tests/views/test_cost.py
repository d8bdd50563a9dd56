"""What a run cost, from the newest line of its timing.jsonl."""

import json
from pathlib import Path
from typing import Any

import pytest

from prefpipe.views import cost

PACE = {"seconds": 7200, "tokens_unique_per_second": 1777.3}
SAMPLED = {"event": "sampled", "seconds": 90.0, "tokens": 180_000}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"event": "rounds", "seconds": 33.9}, "33.9 s"),
        ({**SAMPLED, "peak_memory_gib": 2.345}, "1.5 min, 2,000 tokens/s, 2.35 GiB of memory"),
        ({**PACE, "peak_memory_gib": 1.0, "peak_gpu_memory_gib": 3.5},
         "2.0 h, 1,777 tokens/s, 1.00 GiB of memory, 3.50 GiB of GPU memory"),
        ({"seconds": 0, "tokens": 5}, "0.0 s"),
        ({"seconds": "x", "peak_memory_gib": None}, ""),
    ],
)  # fmt: skip
def test_a_cost_in_words(tmp_path: Path, line: dict[str, Any], words: str) -> None:
    (tmp_path / "timing.jsonl").write_text(f'{{"event": "earlier", "seconds": 1}}\n{json.dumps(line)}\n')
    assert str(cost.of(tmp_path)) == words


def test_a_run_that_notes_no_times_has_no_cost(tmp_path: Path) -> None:
    assert cost.of(tmp_path) is None
