"""What a card does with prefpipe: kernels against plain formulas, steps and memory beside plain transformers and TRL.

    python benchmarks/gpu.py --json FILE [--deadline SECONDS] [--only CHECK ...] [--tiny]

One command of at most eight minutes on one card of 80 GB or more, with torch, transformers, peft and what
requirements/gpu-check.txt lists; nothing is downloaded, weights are random and made on the card. FILE is whole after
every figure. A check that fails, hangs or takes its process with it is noted, and the next ones go on; what
does not fit before the deadline is left out, and the table says so. Without a card the sizes are tiny, and the figures
say only that the script works.
"""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from card.record import Record, table  # noqa: E402  (the package is found through ROOT, installed or not)
from card.supervise import supervise  # noqa: E402
from card.worker import Check, Found, run  # noqa: E402

DEADLINE = 455.0  # seconds: eight minutes, with the time to kill what hangs at their end


def _late(module: str, name: str) -> Callable[[Any], Found]:
    """A check whose module, which brings torch, is imported when it runs: the process that watches needs none of it."""
    return lambda bench: getattr(importlib.import_module(f"card.{module}"), name)(bench)


# What everything else stands on comes first, what may compile for minutes last.
CHECKS = (
    Check("machine", 30, 5, _late("kernels", "machine")),
    Check("attention", 60, 15, _late("kernels", "attention")),
    Check("small model", 75, 25, _late("steps", "small")),
    Check("TRL", 75, 30, _late("peer", "trl")),
    Check("large model", 110, 45, _late("steps", "large")),
    Check("head", 30, 10, _late("kernels", "output_head")),
    Check("scoring", 40, 20, _late("steps", "scoring")),
    Check("checkpoint", 30, 15, _late("steps", "checkpoints")),
    Check("full optimizer", 20, 10, _late("steps", "full_optimizer")),
    Check("FlexAttention", 90, 30, _late("kernels", "flex")),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks in processes of their own, write the record, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--deadline", type=float, default=DEADLINE, help="seconds for everything (default %(default)s)")
    names = [check.name for check in CHECKS]
    parser.add_argument("--only", nargs="*", default=[], metavar="CHECK", choices=names, help=", ".join(names))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU, whatever is here")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(options.only, int(options.worker[0]), float(options.worker[1]), tiny=options.tiny)
        return 0
    until = time.time() + options.deadline
    chosen = [check for check in CHECKS if not options.only or check.name in options.only]
    flags = ["--tiny"] * options.tiny
    said = " ".join(
        ["python benchmarks/gpu.py --json FILE", *flags, *(["--only", *options.only] if options.only else [])]
    )
    record = Record(options.json, said, [check.name for check in chosen])

    def command(names: list[str], pipe: int) -> list[str]:
        return [
            *(sys.executable, __file__, "--json", os.devnull, *flags, "--worker", str(pipe), str(until)),
            *("--only", *names),
        ]  # fmt: skip

    supervise(record, chosen, command, until)
    print(table(record.content))
    return 0


def work(names: Sequence[str], pipe: int, until: float, *, tiny: bool) -> None:
    """The checks of these names in this process; events go to a pipe."""
    import torch
    from card import sizes

    os.set_inheritable(pipe, False)  # or what a compiler starts would keep it open
    on_card = torch.cuda.is_available() and not tiny
    chosen = sizes.real(torch.device("cuda")) if on_card else sizes.tiny(torch.device("cpu"))
    with os.fdopen(pipe, "w", encoding="utf-8") as events:
        run(
            [check for check in CHECKS if check.name in names],
            sizes.Bench(chosen),
            lambda event: print(json.dumps(event), file=events, flush=True),
            until,
        )


if __name__ == "__main__":
    sys.exit(main())
