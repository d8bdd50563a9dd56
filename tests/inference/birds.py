"""What the tests of workers share: prompts about birds, and what a run of them has written."""

import json
import os
import signal
from pathlib import Path

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.errors import DataError
from tests.waiting import until

OF_A_START = ("timing.jsonl", ".owner", "config.json")  # config.json names the number of workers


def write_prompts(path: Path, count: int = 40) -> Path:
    """So many prompts."""
    path.write_text("".join(json.dumps({"prompt": f"Tell me about bird {i}."}) + "\n" for i in range(count)))
    return path


def contents(out: Path) -> dict[str, bytes]:
    """The bytes of every file that does not tell one start of a run from another."""
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name not in OF_A_START}


def pairing(folder: Path, cluster: str = "") -> BuildPairsConfig:
    """Settings for pairs of the run `inline`."""
    return BuildPairsConfig(
        completions=(str(folder / "inline"),), reward="short_sentence", gap_filter="none", truncated_chosen="keep",
        cluster=cluster,
    )  # fmt: skip


def doubled(number: int, other: int, begun: Path) -> tuple[int, int, str, str]:
    """A task: a result, and where and how it came about. The first one waits for another one, which runs elsewhere."""
    until(begun.exists) if number == 0 else begun.touch()
    return 2 * number + other, os.getpid(), str(Path.cwd()), os.environ["POLARS_MAX_THREADS"]


def odd(number: int) -> int:
    raise DataError(f"row {number} is odd", "mend it")


def killed(_number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def process() -> dict[str, str]:
    """An identity that no two processes share."""
    return {"process": str(os.getpid())}
