"""What the sandbox of code rewards costs: `taskset -c 1 python benchmarks/code_rewards.py`.

One worker runs a program of two lines with two asserts. Prints programs per second, and CPU seconds of the processes.
"""

import resource
import time

from prefpipe.config.rewards import Code
from prefpipe.rewards.base import Answer
from prefpipe.rewards.code_tests import code

PROGRAM = Answer([], "def add(a, b):\n    return a + b\n", "assert add(1, 2) == 3\nassert add(-1, 1) == 0")
COUNT = 60


def cpu_seconds() -> float:
    """CPU time of the processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Rate the program a few times untimed, then COUNT times."""
    rate = code(Code(num_workers=1))
    rate([PROGRAM] * 3)
    cpu, start = cpu_seconds(), time.perf_counter()
    scores = rate([PROGRAM] * COUNT)
    seconds, used = time.perf_counter() - start, cpu_seconds() - cpu
    if any(s.reward != 1 for s in scores):
        raise SystemExit(f"a right program has not passed: {scores}")
    print(f"{COUNT / seconds:.1f} programs a second, {1000 * used / COUNT:.0f} ms of CPU each")


if __name__ == "__main__":
    main()
