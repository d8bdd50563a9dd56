"""What the tests of workers share: prompts about birds, and what a run of them has written."""

import json
from pathlib import Path

OF_A_START = ("timing.jsonl", ".owner", "config.json")  # config.json names the number of workers


def write_prompts(path: Path, count: int = 40) -> Path:
    """So many prompts."""
    path.write_text("".join(json.dumps({"prompt": f"Tell me about bird {i}."}) + "\n" for i in range(count)))
    return path


def contents(out: Path) -> dict[str, bytes]:
    """The bytes of every file that does not tell one start of a run from another."""
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name not in OF_A_START}
