"""Functions for tests of isolation: they run in other processes, by name."""

import mmap
import os
import signal
import sys
import time

calls: list[int] = []


def double(value: int) -> int:
    sys.stdout.write("printed text must not disturb the answers")
    return 2 * value


def behave(how: str) -> str:
    match how:
        case "hang":
            while True:
                pass
        case "raise":
            raise ValueError("no such thing")
        case "exit":
            raise SystemExit(3)
        case "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "eat":
            return str(len(mmap.mmap(-1, 5 << 30)))  # address space only, nothing is touched
        case "sleep":
            time.sleep(0.3)
    return how
