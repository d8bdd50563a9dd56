# pyright: basic, reportMissingImports=false
# ray ships incomplete types.
"""Workers on the machines of a Ray cluster.

An actor of Ray holds no engine: it starts the process of a worker on its machine (see pool_processes) and carries
messages. So a worker is the same program everywhere, its death is told from that of its machine, and nothing that it
said is lost with it. Ray restarts and repeats nothing: the driver does, which knows what was in an engine.
"""

import contextlib
import logging
import os
import signal
import threading
from typing import Any

import ray
from ray.exceptions import RayError

from prefpipe import clock, log
from prefpipe.errors import UsageError
from prefpipe.inference.pool_messages import Event, Gone
from prefpipe.inference.pool_processes import Processes
from prefpipe.inference.pool_size import Size

_POLL_S = 2.0
_LINGER_S = 0.01  # for each worker: with more of them, each is asked less often
_GRACE_S = 35.0


def connect(size: Size) -> Size:
    """Join the cluster; the size with as many workers as it has room for, where none are asked for. Raises UsageError
    for a cluster that is not there or too small: Ray would wait for ever."""
    address = size.cluster.removeprefix("ray").removeprefix("://") or "auto"
    if not ray.is_initialized():
        is_main = threading.current_thread() is threading.main_thread()  # no other one may set handlers, nor does Ray
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if is_main}
        try:
            ray.init(address, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UsageError(
                f"cluster = {size.cluster}: {error}", "start Ray on this machine (ray start), or check the address"
            ) from error
        for number, handler in handlers.items():  # Ray's own ends the process with another exit code
            signal.signal(number, handler)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(_room(node, size.gpus_each) for node in nodes)
    what = f"{size.gpus_each} GPUs" if size.gpus_each else "a CPU"
    if room < max(1, size.workers):
        ray.shutdown()
        raise UsageError(
            f"cluster = {size.cluster} has room for {room} workers with {what} each on one machine, and "
            f"{size.workers or 'at least 1'} are asked for",
            "ask for fewer workers, or wait until its machines are up (ray status)",
        )
    return Size(size.workers or room, size.cluster, size.gpus_each)


def _room(node: dict[str, float], gpus_each: int) -> int:
    cpus = int(node.get("CPU", 0))
    return min(cpus, int(node.get("GPU", 0)) // gpus_each) if gpus_each else cpus


class Relay:
    """The actor: one worker process on its machine, whose GPUs are those that Ray gave to the actor."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._processes = Processes([environment])
        self._processes.start(0)

    @ray.method(concurrency_group="send")
    def send(self, message: Any) -> None:
        """Carry a message to it."""
        self._processes.send(0, message)

    @ray.method(concurrency_group="poll")
    def poll(self, linger: float) -> list[Event]:
        """What it has said; waits a moment longer for more, since a call costs more than a message."""
        events = self._processes.wait(_POLL_S)
        until = clock.monotonic() + linger
        while events and not isinstance(events[-1][1], Gone) and (left := until - clock.monotonic()) > 0:
            events += self._processes.wait(left)
        return [event for _, event in events]

    def close(self, gently: bool) -> None:  # noqa: FBT001  (calls of actors have no keywords of ours)
        """End the process."""
        self._processes.close(gently=gently)


class Cluster:
    """The backend."""

    start_s = 50.0  # for a place on a machine and the process on it

    def __init__(self, size: Size) -> None:
        threads = {"OMP_WAIT_POLICY": "passive", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        if "OMP_NUM_THREADS" in os.environ:
            threads["OMP_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
        self._environment = threads
        self._linger = _LINGER_S * size.workers
        options: dict[str, Any] = {  # ray's types know only some of them
            "num_cpus": 1,
            "num_gpus": size.gpus_each,
            "max_restarts": 0,
            "max_task_retries": 0,
            "concurrency_groups": {"send": 1, "poll": 1},  # each in the order of its calls
        }
        self._actor_class = ray.remote(**options)(Relay)
        self._actors: dict[int, Any] = {}
        self._polls: dict[Any, int] = {}

    def start(self, number: int) -> None:
        """Start an actor with its worker, as soon as there is a place."""
        self._actors[number] = self._actor_class.remote(self._environment)
        self._poll(number)

    def send(self, number: int, message: Any) -> None:
        """Carry a message to a worker."""
        self._actors[number].send.remote(message)

    def wait(self, timeout: float) -> list[tuple[int, Event]]:
        """What workers have said, waiting at most `timeout` seconds."""
        ray.wait(list(self._polls), num_returns=1, timeout=timeout)
        ready, _ = ray.wait(list(self._polls), num_returns=len(self._polls), timeout=0)
        numbers = {ref: self._polls.pop(ref) for ref in ready}
        return [(number, event) for ref, number in numbers.items() for event in self._said(number, ref)]

    def stop(self, number: int) -> None:
        """End a worker and its actor at once."""
        self._polls = {ref: n for ref, n in self._polls.items() if n != number}
        ray.kill(self._actors.pop(number))

    def close(self, *, gently: bool) -> None:
        """End all workers, and leave the cluster."""
        ends = [actor.close.remote(gently) for actor in self._actors.values()]
        with contextlib.suppress(RayError):
            ray.wait(ends, num_returns=len(ends), timeout=_GRACE_S if gently else 1.0)
        for number in list(self._actors):
            self.stop(number)
        ray.shutdown()

    def _poll(self, number: int) -> None:
        self._polls[self._actors[number].poll.remote(self._linger)] = number

    def _said(self, number: int, ref: Any) -> list[Event]:
        try:
            events: list[Event] = ray.get(ref)
        except RayError as error:
            with contextlib.suppress(RayError):  # its machine may be out of reach for a while only
                ray.kill(self._actors.pop(number))
            log.info(f"worker {number}: {type(error).__name__}")
            return [Gone(f"its actor or machine is gone: {type(error).__name__}", blameless=True)]
        if events and isinstance(events[-1], Gone):
            ray.kill(self._actors.pop(number))
        else:
            self._poll(number)
        return events
