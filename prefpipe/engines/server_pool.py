"""Requests to one or several servers: least load first, a window each, retries, and what is loaded there.

An event loop in another thread does the waiting. A request is sent again with its seed when its server is busy, late or
gone, to any server that is there; the reply that comes first is the only one that anybody sees.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

from prefpipe import api_key, http
from prefpipe.engines.base import ScoreRequest
from prefpipe.engines.server_place import Place, json_of, look
from prefpipe.errors import StorageError, UsageError
from prefpipe.http import Answer
from prefpipe.models.policy import Policy

T = TypeVar("T")
BACKOFF_SECONDS = 1.0
_RETRIES = 8  # about three minutes: as long as a server needs to start again
_RETRIES_BESIDE_OTHERS = 2  # of what one server of several must answer
_LATE_RETRIES = 1
_REFUSED = (401, 403)
_DYING = (500, 502)  # what vLLM answers when its engine dies, and a router before it
_BYTES_PER_TOKEN = 1024  # of a reply with log-probs: 119 were seen, of both kinds of ids together
_SMALLEST = 1 << 20


@dataclass
class Server:
    """A server and the requests under way there.

    load: how many; adapter: whether they are to the adapter or to the base
    losses: how often its connection was lost; it may be another process after each
    failures: in a row; while there is another server, it gets nothing before `rests_until` (time of the loop)
    place: what it was the last time somebody looked, after `known_losses` losses
    """

    url: str
    load: int = 0
    adapter: bool = True
    losses: int = 0
    failures: int = 0
    rests_until: float = 0.0
    place: Place | None = None
    known_losses: int = -1
    looking: asyncio.Lock = field(default_factory=asyncio.Lock)

    def note(self, now: float, *, is_well: bool) -> None:
        """Keep how a request came out."""
        self.failures = 0 if is_well else self.failures + 1
        self.rests_until = 0.0 if is_well else now + http.pause(BACKOFF_SECONDS, self.failures, None)

    @property
    def is_known(self) -> bool:
        """Whether somebody has looked at it since its connection was lost."""
        return self.place is not None and self.known_losses == self.losses


@dataclass(frozen=True)
class Job:
    """A request: to sample or to score, with the adapter or the base; `ids` are those that are sent, and `tokens` the
    most that a reply is about. `parts` is what the request of a protocol is made of."""

    ids: Sequence[int]
    tokens: int
    adapter: bool
    kind: str
    parts: Any

    def body(self, place: Place) -> dict[str, Any]:
        """The request in the protocol of a server."""
        write = place.wire.sample if self.kind == "sample" else place.wire.score
        return write(place.policy if self.adapter else place.base, self.ids, self.parts)

    def read(self, place: Place, reply: Any) -> Any:
        """What a reply says: see `Wire`."""
        if self.kind == "sample":
            return place.wire.read_sample(reply, self.ids)
        return place.wire.read_score(reply, self.ids, self.parts)


@dataclass(frozen=True)
class Answered:
    """The reply to a job, as the JSON that came: from which server, and how often that had been lost by then."""

    server: Server
    losses: int
    place: Place
    reply: Any


class _Failed(Exception):
    """A server failed while somebody looked at it."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.shown)
        self.answer = answer


class Pool:
    """Servers that hold one policy."""

    def __init__(self, urls: Sequence[str], key_variable: str, timeout_seconds: float, window: int) -> None:
        self.servers = [Server(url.removesuffix("/v1")) for url in dict.fromkeys(urls)]
        self.window = window
        self._key_variable = key_variable
        self._open = ExitStack()
        key = api_key.read(key_variable)
        connections = (window + 1) * len(self.servers)
        self._link = http.link([s.url for s in self.servers], "base_urls", key, timeout_seconds, connections)
        self._loop = self._open.enter_context(http.loop_in_thread())
        self._changed = asyncio.Condition()

    def close(self) -> None:
        """End what is under way."""
        self.wait(self._link.client.aclose())
        self._open.close()

    def start(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Let the loop work on something."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of something that the loop works on."""
        running = self.start(work)
        try:
            return running.result()
        finally:
            running.cancel()

    def look_at_all(self, policy: Policy, longest: int) -> None:
        """Find out what every server is. Raises StorageError for one that is not there."""
        for server in self.servers:
            try:
                self.wait(self._look(server, policy, longest))
            except _Failed as failed:
                raise self._unanswered(server, failed.answer) from None

    async def _look(self, server: Server, policy: Policy, longest: int) -> None:
        """Find out what a server is, unless that is known, and see that it has the adapter of the policy."""
        async with server.looking:
            if server.is_known:
                return
            losses = server.losses
            found = await look(self._link, server.url, policy, longest, self._refuse)
            if server.place is not None and server.place != found:
                raise UsageError(
                    f"the server at {server.url} was {server.place.build} ({server.place.protocol}), and is "
                    f"{found.build} ({found.protocol}) now",
                    "values of two builds do not go into one run: start the server as before, or a new run",
                )
            server.place, server.known_losses = found, losses

    async def ask(self, job: Job, policy: Policy, longest: int, only: Server | None = None) -> Answered:
        """The reply to a job, from the server with the least load or from `only`.

        Raises StorageError when no server answers for minutes, UsageError when one refuses.
        """
        attempt = 0
        while True:
            server = await self._enter(only, adapter=job.adapter)
            try:
                answer = await self._ask_once(server, job, policy, longest)
            finally:
                await self._leave(server)
            if isinstance(answer, Answered):
                return answer
            if attempt >= self._most_retries(answer, only):
                raise self._unanswered(server, answer)
            await asyncio.sleep(http.pause(BACKOFF_SECONDS, attempt, answer.retry_after))
            attempt += 1

    def _most_retries(self, answer: Answer, only: Server | None) -> int:
        if answer.failure == "late":
            return _LATE_RETRIES
        return _RETRIES if only is None or len(self.servers) == 1 else _RETRIES_BESIDE_OTHERS

    async def _ask_once(self, server: Server, job: Job, policy: Policy, longest: int) -> Answered | Answer:
        losses = server.losses
        try:
            await self._look(server, policy, longest)
        except _Failed as failed:
            server.note(self._loop.time(), is_well=False)
            return failed.answer
        place = server.place
        assert place is not None
        url, size = server.url + place.wire.path, _SMALLEST + _BYTES_PER_TOKEN * job.tokens
        answer = await http.ask(self._link, url, job.body(place), most_bytes=size)
        is_lost = answer.failure in ("broken", "unreachable") or answer.status in _DYING
        if is_lost and losses == server.losses:  # one loss, whoever sees it
            server.losses += 1
        server.note(self._loop.time(), is_well=not answer.is_transient)
        if answer.is_transient:
            return answer
        if answer.status != 200:
            raise self._refuse(server.url, answer)
        return Answered(server, losses, place, json_of(server.url, answer))

    async def _enter(self, only: Server | None, *, adapter: bool) -> Server:
        """A place at a server. Requests to the adapter and to the base do not meet: vLLM on a CPU dies of log-probs of
        both in one batch, and all requests with it."""

        def free() -> list[Server]:
            awake = [s for s in self.servers if s.rests_until <= self._loop.time()]
            limit = self.window + bool(only)  # a canary does not wait for the others
            candidates = [only] if only else awake or self.servers
            return [s for s in candidates if s.load == 0 or (s.load < limit and s.adapter == adapter)]

        async with self._changed:
            await self._changed.wait_for(free)
            server = min(free(), key=lambda s: s.load)
            server.load += 1
            server.adapter = adapter
            return server

    async def _leave(self, server: Server) -> None:
        async with self._changed:
            server.load -= 1
            self._changed.notify_all()

    def _refuse(self, url: str, answer: Answer) -> Exception:
        """The error for an answer that is no reply."""
        if answer.is_transient:
            return _Failed(answer)
        if answer.status in _REFUSED:
            sent = f"the key in {self._key_variable}" if self._link.key else f"no key ({self._key_variable} is not set)"
            return UsageError(
                f"the server at {url} refuses {sent}: {answer.status} {answer.shown}",
                f"put its key into the environment variable {self._key_variable} (setting api_key_env)",
            )
        return UsageError(
            f"the server at {url} refuses a request: {answer.status} {answer.shown}",
            "check that it serves this model with this context (docs/servers.md has the command that starts one)",
        )

    def _unanswered(self, server: Server, answer: Answer) -> StorageError:
        """The error for a server that does not answer, however often it is asked."""
        if answer.failure == "late":
            return StorageError(
                f"the server at {server.url} gave no answer within {self._link.timeout_seconds:g} s, asked "
                f"{_LATE_RETRIES + 1} times",
                "raise timeout_seconds or lower max_num_seqs; the same command resumes",
            )
        if answer.status:
            return StorageError(
                f"the server at {server.url} fails: {answer.status} {answer.shown}",
                "look at its log; the same command resumes when it is mended",
            )
        return StorageError(
            f"the server at {server.url} cannot be reached: {answer.shown}",
            f"start it, check base_urls{http.proxy_hint()}; the same command resumes",
        )


def score_job(sequence: ScoreRequest, *, adapter: bool) -> Job:
    """The job that scores a sequence."""
    ids = [*sequence.prompt_token_ids, *sequence.token_ids]
    return Job(ids, len(ids), adapter, "score", len(sequence.prompt_token_ids))
