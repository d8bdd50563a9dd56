"""Calls in processes that can be killed: order, failures of every kind, and nothing left behind."""

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from prefpipe.errors import Interrupted
from prefpipe.rewards import isolation
from prefpipe.rewards.isolation import Outcome, isolated
from tests.waiting import interruption, until

HERE = "tests.rewards.checkers"
OWN = os.getpid() / 1e7  # added to time limits: tells our processes from those of another test run


def children() -> set[int]:
    """Parents of workers of this test run that are alive."""
    found = set[int]()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command, parent = (path / "cmdline").read_bytes(), (path / "stat").read_text().rsplit(")", 1)[1].split()[1]
        except OSError:
            continue
        if {str(t + OWN).encode() for t in (1, 20, 600)} & {*command.split(b"\0")}:
            found.add(int(parent))
    return found


def test_outcomes_come_in_the_order_of_the_calls() -> None:
    call_all = isolated(f"{HERE}:double", timeout_seconds=20, num_workers=3)
    assert call_all([[i] for i in range(50)]) == [Outcome(2 * i, "ok", None) for i in range(50)]
    assert call_all([[i] for i in range(3)]) == [Outcome(2 * i, "ok", None) for i in range(3)]
    assert call_all([]) == []


def test_a_bad_call_costs_itself_and_nothing_else() -> None:
    call_all = isolated(f"{HERE}:behave", timeout_seconds=60, num_workers=2)
    how = ["fine", "raise", "exit", "die", "fine", "eat", "fine"]
    outcomes = dict(enumerate(call_all([[h] for h in how])))
    assert [i for i, o in outcomes.items() if o == Outcome("fine", "ok", None)] == [0, 4, 6]
    assert outcomes[1] == Outcome(None, "crash", "ValueError: no such thing")
    assert outcomes[2] == Outcome(None, "crash", "SystemExit: 3")
    assert outcomes[3] == Outcome(None, "crash", "the process ended with signal 11")
    assert (outcomes[5].status, outcomes[5].detail) == ("crash", "OSError: [Errno 12] Cannot allocate memory")


def test_a_call_that_hangs_costs_itself() -> None:
    """A machine may be too busy for one that is fine, too: another one comes in time."""
    call_all = isolated(f"{HERE}:behave", timeout_seconds=1, num_workers=1)
    hung, _ = call_all([["hang"], ["fine"]])
    assert hung == Outcome(None, "timeout", "more than 1 s")
    until(lambda: call_all([["fine"]]) == [Outcome("fine", "ok", None)])


def test_it_works_from_a_thread() -> None:
    call_all = isolated(f"{HERE}:double", timeout_seconds=20, num_workers=1)
    found: list[Outcome] = []
    thread = threading.Thread(target=lambda: found.extend(call_all([[4]])))
    thread.start()
    thread.join()
    assert found == [Outcome(8, "ok", None)]


def test_no_process_outlives_the_function() -> None:
    call_all = isolated(f"{HERE}:behave", timeout_seconds=20 + OWN, num_workers=2)
    call_all([["fine"], ["fine"]])
    assert os.getpid() in children()
    del call_all
    gc.collect()
    until(lambda: not children())


def test_an_interrupt_ends_calls_that_hang() -> None:
    call_all = isolated(f"{HERE}:behave", timeout_seconds=600 + OWN, num_workers=1)
    with interruption(Interrupted(15)) as interrupt:

        def later() -> None:
            until(lambda: children() - {os.getpid()})  # the call runs, in a fork of the worker
            interrupt()

        thread = threading.Thread(target=later)
        thread.start()
        with pytest.raises(Interrupted):
            call_all([["hang"], ["fine"]])
        thread.join()
    until(lambda: not children())


def test_no_process_outlives_a_killed_owner() -> None:
    code = (
        "from prefpipe.rewards.isolation import isolated\n"
        f"call = isolated('{HERE}:behave', timeout_seconds={1 + OWN}, num_workers=1)\n"
        "print(call([['fine']]), flush=True)\n"
        "call([['hang']] * 100)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    with owner:
        assert b"fine" in owner.stdout.readline()
        owner.kill()
    until(lambda: not children())


def test_a_worker_that_is_gone_is_a_crash_and_is_replaced() -> None:
    call_all = isolated("tests.rewards.no_such_module:f", timeout_seconds=5, num_workers=1)
    assert call_all([[1]]) == [Outcome(None, "crash", "the process of the checker died")]


def test_zero_workers_stand_for_the_cores() -> None:
    assert isolation.num_cores(0) == len(os.sched_getaffinity(0))
    assert isolation.num_cores(5) == 5
