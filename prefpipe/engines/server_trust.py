"""Whether a server holds the policy and gives raw log-probs: asked at the start, behind every batch of results, and
from scratch after every lost connection."""

from collections.abc import Callable
from typing import Any

from prefpipe import log
from prefpipe.engines import server_canaries as canaries
from prefpipe.engines.base import EngineSettings, ScoreRequest
from prefpipe.engines.server_canaries import Values
from prefpipe.engines.server_pool import Job, Server, score_job
from prefpipe.engines.server_protocols import Sampling
from prefpipe.errors import DataError, IdentityError, StorageError
from prefpipe.forward.agreement import absolute_limit

Ask = Callable[[Server, Job, Sampling | None], Any]  # the result of one job from one server

_TRIES = 5  # to prove a server whose connection is lost meanwhile
_PROBE_TOKENS = 16
_PROBE_SEEDS = (1, 2, 3)


class Trust:
    """What is known of servers that are said to hold one policy."""

    def __init__(self, settings: EngineSettings, scorer: str, ask: Ask) -> None:
        self._settings = settings
        self._scorer = scorer
        self._ask = ask
        self._canaries = canaries.sequences(settings)
        self._shelf = canaries.Shelf.of(self._canaries)
        # By URL and side (adapter on or off): losses when it was admitted, and what it gave on the canaries.
        self._admitted: dict[tuple[str, bool], tuple[int, Values]] = {}
        self._proofs = self._equal = 0
        self._furthest = 0.0

    @property
    def summary(self) -> str:
        """How the canaries came out, as a line of the log."""
        return (
            f"servers: canaries compared {self._proofs} times, {self._equal} of them equal to the bit, at most "
            f"{self._furthest:.6f} nats per token apart on average"
        )

    def prove(self, server: Server, *, adapter: bool) -> int:
        """See that a server holds the policy. Returns how often it had been lost when it proved that.

        Raises IdentityError for other weights, DataError for log-probs that are not raw, StorageError for a server that
        does not stay long enough.
        """
        for _ in range(_TRIES):
            epoch = server.losses
            known = self._admitted.get((server.url, adapter))
            found = self._score(server, adapter=adapter)
            if known is not None:
                self._compare(server, found, self._scorer, known[1], "what it gave at the start")
            if known is None or known[0] != epoch:
                self._admit(server, found, adapter=adapter)
            if server.losses == epoch:
                self._admitted[server.url, adapter] = (epoch, found if known is None else known[1])
                return epoch
        raise StorageError(
            f"the connection to the server at {server.url} is lost again and again",
            "look at its log, and at what lies between; the same command resumes",
        )

    def _admit(self, server: Server, found: Values, *, adapter: bool) -> None:
        """Compare a server that is new, or was lost, with all that is known of the policy."""
        policy = self._settings.policy
        name = policy.id if adapter else policy.base_id
        other = self._shelf.policy_with(self._scorer, found, name)
        if other is None and policy.adapter is not None and adapter and found == self._score(server, adapter=False):
            other = f"its base {policy.base_id}"
        if other is not None:
            raise IdentityError(
                f"the server at {server.url} gives for {name} just what it gives for {other}",
                "check which model it serves, and that it applies the adapter",
            )
        known = self._shelf.values(name)
        if not _computed(known):
            here = canaries.computed_here(self._canaries, self._settings, adapter=adapter)
            if here is not None:
                self._shelf.keep(name, *here)
                known = dict([here])  # it decides, whatever servers said before
        for scorer, values in known.items():
            self._compare(server, found, scorer, values, f"what {scorer} gave ({self._shelf.file(name)})")
        self._check_raw(server, adapter=adapter)
        self._shelf.keep(name, self._scorer, known.get(self._scorer, found))
        if not _computed(known):
            log.warn(
                f"that the server at {server.url} holds {name} is its claim: nothing is known from a forward pass "
                "here. The audit of train will compare"
            )

    def _compare(self, server: Server, found: Values, scorer: str, known: Values, what: str) -> None:
        full = canaries.both_full(self._scorer, scorer)
        difference = canaries.compare(found, known, full_precision=full)
        self._proofs += 1
        self._equal += difference.is_equal
        self._furthest = max(self._furthest, difference.absolute)
        if not difference.agrees:
            raise IdentityError(
                f"the server at {server.url} holds other weights: on the canaries it is {difference.signed:+.4f} nats "
                f"per token ({difference.absolute:.4f} in absolute value) from {what}",
                "serve the model and adapter of this command, in the number type that dtype says; if that file is of a "
                "server that was wrong, delete it. Nothing that it gave since the last check is kept",
            )

    def _check_raw(self, server: Server, *, adapter: bool) -> None:
        """Sample hot and truncated, and score what came: raw log-probs do not depend on how a token was drawn."""
        prompt = self._canaries[0].prompt_token_ids
        stops = tuple(sorted(self._settings.stops))
        room = min(_PROBE_TOKENS, max(1, self._settings.max_model_len - len(prompt)))
        deltas: list[float] = []
        for seed in _PROBE_SEEDS:
            sampling = Sampling(2.0, seed, 0.8, 0, 0.0, room, stops)
            said = self._ask(server, Job(prompt, len(prompt) + room, adapter, "sample", sampling), sampling)
            again = self._ask(server, score_job(ScoreRequest("", prompt, said.token_ids), adapter=adapter), None)
            deltas += [abs(a - b) for a, b in zip(said.token_logps, again, strict=True)]
        off = sum(deltas) / len(deltas)
        if off > absolute_limit(full_precision=canaries.both_full(self._scorer)):
            raise DataError(
                f"the server at {server.url} does not return raw log-probs: those of tokens sampled with temperature 2 "
                f"and top_p 0.8 are {off:.4f} nats per token from those of the same tokens in a prompt",
                "start vLLM with --logprobs-mode raw_logprobs, SGLang with SGLANG_RETURN_ORIGINAL_LOGPROB=1 in its "
                "environment",
            )

    def _score(self, server: Server, *, adapter: bool) -> Values:
        scored = {c.completion_id: self._ask(server, score_job(c, adapter=adapter), None) for c in self._canaries}
        return canaries.in_order(self._canaries, scored)


def _computed(known: dict[str, Values]) -> bool:
    """Whether a forward pass on this machine is among the scorers."""
    return any(not scorer.startswith(canaries.SERVER) for scorer in known)
