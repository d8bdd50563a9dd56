"""The engine behind a URL: vLLM or SGLang servers that hold the policy, asked over HTTP with token ids.

    ServerEngine     requests in, results out; a result leaves when its server was proved after it came
    server_pool      which server a request goes to, and when it is sent again
    server_place     what a server is and has
    server_protocols how requests and replies are written
    server_trust     whether a server holds the policy, and gives raw log-probs
    server_canaries  log-probs that tell one set of weights from another

A server may be restarted, reconfigured or given other weights at any time. So results wait until their server has
scored the canaries again as it did at the start, and those from before a lost connection are asked for again.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any, Self

from prefpipe import log
from prefpipe.engines.base import Draw, EngineSettings, Query, Request, Response, Sample, ScoreRequest
from prefpipe.engines.server_canaries import SERVER
from prefpipe.engines.server_pool import Answered, Job, Pool, Server, score_job
from prefpipe.engines.server_protocols import Said, Sampling, Untrusted, check_end
from prefpipe.engines.server_trust import Trust
from prefpipe.errors import DataError, IdentityError, StorageError, UsageError
from prefpipe.models.policy import Policy

_HELD = 4  # windows of results that wait for one proof


@dataclass(frozen=True)
class _Item:
    """A job with its key and how it samples; None when it scores."""

    key: Any
    job: Job
    sampling: Sampling | None


@dataclass
class _Run:
    """The items of one call: those to ask for again, those at servers, and results that wait for a proof."""

    source: Iterator[_Item]
    is_drained: bool = False
    again: list[_Item] = field(default_factory=list[_Item])
    inside: dict[int, "Future[Answered]"] = field(default_factory=dict[int, "Future[Answered]"])
    held: dict[str, list[tuple[_Item, Answered, Any]]] = field(default_factory=dict[str, Any])
    arrived: "SimpleQueue[tuple[int, _Item, Answered | BaseException]]" = field(
        default_factory=SimpleQueue[tuple[int, _Item, Answered | BaseException]]
    )

    def next_item(self) -> _Item | None:
        """The next item to ask for."""
        item = self.again.pop() if self.again else next(self.source, None)
        self.is_drained = item is None
        return item

    @property
    def is_idle(self) -> bool:
        """Whether everything has been asked for, and nothing is at a server."""
        return self.is_drained and not self.inside and not self.again


class ServerEngine:
    """Servers that hold one policy. Nothing that it yields is older than the last proof of its server."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._pool = Pool(settings.base_urls, settings.api_key_env, settings.timeout_seconds, settings.max_num_seqs)
        self._labels: defaultdict[str, set[str]] = defaultdict(set)  # of weights, by URL
        try:
            self._build = self._one_build()
            self._trust = Trust(settings, self.scorer, self._ask)
            for server in self._pool.servers:
                self._trust.prove(server, adapter=True)
        except BaseException:
            self._pool.close()
            raise

    @property
    def scorer(self) -> str:
        """Names the numerics of the log-probs; the number type is what the settings claim of the server."""
        return f"{SERVER}{self._build}/{self._settings.dtype}"

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Sample]]]:
        """One request for each draw, with its seed; a prompt comes back when all its draws are there and proved."""
        waiting: dict[str, tuple[Request, list[Sample]]] = {}

        def items() -> Iterator[_Item]:
            for request in requests:
                waiting[request.prompt_id] = (request, [])
                for draw in request.draws:
                    sampling = self._sampling(draw.seed, draw.temperature)
                    key = (request.prompt_id, draw)
                    yield _Item(key, self._sample_job(request.prompt_token_ids, sampling), sampling)

        for (prompt_id, draw), said in self._run(items()):
            request, samples = waiting[prompt_id]
            samples.append(_to_sample(draw, said))
            if len(samples) == len(request.draws):
                del waiting[prompt_id]
                yield request, sorted(samples, key=lambda s: s.sample_index)

    def score(self, sequences: Iterable[ScoreRequest], *, adapter: bool) -> Iterator[tuple[str, list[float]]]:
        """The log-probs that a server gives of prompt and completion as of one prompt."""
        with_adapter = adapter or self._settings.policy.adapter is None
        items = (_Item(sequence, score_job(sequence, adapter=with_adapter), None) for sequence in sequences)
        for sequence, values in self._run(items):
            yield sequence.completion_id, sequence.scored(values)

    def respond(self, queries: Iterable[Query]) -> Iterator[tuple[Query, Response]]:
        """Answers follow a grammar that the server makes of the schema, where a query has one."""
        sampled = ((query, self._sampling(query.seed, query.temperature, query.schema)) for query in queries)
        items = (_Item(query, self._sample_job(query.prompt_token_ids, s), s) for query, s in sampled)
        for query, said in self._run(items):
            yield query, Response(said.token_ids, said.finish_reason)

    def take(self, policy: Policy) -> bool:  # noqa: ARG002  (a new engine costs no start, and proves every server anew)
        """None: another policy is proved from the start."""
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.close()
        log.info(self._trust.summary)

    def _run(self, items: Iterator[_Item]) -> Iterator[tuple[Any, Any]]:
        """(key, result) of items, of which a window is at each server. Results come in batches, behind a proof."""
        run = _Run(items)
        window = self._pool.window * len(self._pool.servers)
        try:
            while True:
                while len(run.inside) < window and (item := run.next_item()) is not None:
                    self._send(run, item)
                if run.inside:
                    self._receive(run)
                for server in self._pool.servers:
                    held = run.held.get(server.url, [])
                    if len(held) >= _HELD * self._pool.window or (held and run.is_idle):
                        yield from self._released(run, server)
                if run.is_idle and not any(run.held.values()):
                    return
        finally:
            for future in run.inside.values():
                future.cancel()

    def _send(self, run: _Run, item: _Item) -> None:
        number = id(item)
        future = self._pool.start(self._pool.ask(item.job, self._settings.policy, self._settings.max_model_len))
        run.inside[number] = future
        future.add_done_callback(partial(_arrive, run, item))

    def _receive(self, run: _Run) -> None:
        """Take the next reply and read it."""
        number, item, answered = run.arrived.get()
        del run.inside[number]
        if isinstance(answered, BaseException):
            raise answered
        run.held.setdefault(answered.server.url, []).append((item, answered, self._read(item, answered)))

    def _released(self, run: _Run, server: Server) -> Iterator[tuple[Any, Any]]:
        """Results of a server that it gave since its connection was lost the last time, after a proof; the others are
        asked for again."""
        held = run.held.pop(server.url)
        adapter = held[0][0].job.adapter
        try:
            epoch = self._trust.prove(server, adapter=adapter)
        except StorageError:
            if all(other.failures for other in self._pool.servers):
                raise
            log.warn(f"the server at {server.url} is gone: what it gave since the last check is asked for elsewhere")
            run.again += [item for item, _, _ in held]
            return
        run.again += [item for item, answered, _ in held if answered.losses != epoch]
        yield from ((item.key, value) for item, answered, value in held if answered.losses == epoch)

    def _read(self, item: _Item, answered: Answered) -> Any:
        """What a reply says. Raises DataError for one that cannot be trusted, IdentityError for other weights."""
        url = answered.server.url
        try:
            value = item.job.read(answered.place, answered.reply)
            if item.sampling is not None:
                check_end(value, item.sampling, self._settings.stops)
                self._labels[url] |= value.labels
        except Untrusted as error:
            raise DataError(
                f"the server at {url} cannot be trusted: {error}",
                "rows need the ids and the raw log-probs of just what was asked: docs/servers.md",
            ) from None
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DataError(
                f"the server at {url} gives a reply of another form: {type(error).__name__} {error}",
                f"it should speak {answered.place.protocol}; docs/servers.md names the versions",
            ) from None
        if len(self._labels[url]) > 1:
            found = ", ".join(sorted(self._labels[url]))
            raise IdentityError(
                f"the server at {url} changed its weights: its replies are labelled {found}",
                "start a server that keeps its weights; the same command resumes",
            )
        return value

    def _one_build(self) -> str:
        """Look at every server. Raises UsageError where they differ: the values of a run have one scorer."""
        self._pool.look_at_all(self._settings.policy, self._settings.max_model_len)
        builds = {s.url: s.place.build for s in self._pool.servers if s.place is not None}
        if len(set(builds.values())) > 1:
            found = ", ".join(f"{url} is {build}" for url, build in builds.items())
            raise UsageError(f"the servers are not the same: {found}", "use one version behind all base_urls")
        return next(iter(builds.values()))

    def _ask(self, server: Server, job: Job, sampling: Sampling | None) -> Any:
        """The result of one job from one server."""
        policy, longest = self._settings.policy, self._settings.max_model_len
        answered = self._pool.wait(self._pool.ask(job, policy, longest, only=server))
        return self._read(_Item("", job, sampling), answered)

    def _sampling(self, seed: int, temperature: float, schema: Any = None) -> Sampling:
        settings = self._settings
        return Sampling(
            temperature,
            seed,
            settings.top_p,
            settings.top_k,
            settings.min_p,
            settings.max_tokens,
            tuple(sorted(settings.stops)),
            schema,
        )

    def _sample_job(self, prompt: Sequence[int], sampling: Sampling) -> Job:
        return Job(prompt, len(prompt) + sampling.max_tokens, adapter=True, kind="sample", parts=sampling)


def _to_sample(draw: Draw, said: Said) -> Sample:
    return Sample(draw.sample_index, said.token_ids, said.token_logps, said.finish_reason)


def _arrive(run: _Run, item: _Item, future: "Future[Answered]") -> None:
    """Called in the loop when a job is done; a job that was cancelled is waited for by nobody."""
    if not future.cancelled():
        error = future.exception()
        run.arrived.put((id(item), item, error if error is not None else future.result()))
