"""Prompts to shards: whole ones only, in their order, whatever order an engine finishes in."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefpipe.engines import base
from prefpipe.engines.base import Draw, Request, Sample, ScoreRequest
from prefpipe.errors import PrefpipeError, RowFault
from prefpipe.ids import content_id
from prefpipe.inference import sampling
from prefpipe.inference.inflight import Inflight
from prefpipe.inference.sampling import Ready, Sampled, Shard
from prefpipe.models.chat import Chat
from prefpipe.schemas import Dropped, Message, Prompt
from tests.engines.cases import ScriptedEngine

DRAWS = (Draw(0, 1, 1.0), Draw(1, 2, 1.0))


class Recorder:
    """A stage that remembers what it was given."""

    def __init__(self, draws: Callable[[Prompt], tuple[Draw, ...]] = lambda _prompt: DRAWS) -> None:
        self.committed: dict[int, list[Sampled]] = {}
        self.dropped: dict[int, list[Dropped]] = {}
        self.taken_at_commit: list[int] = []
        self._draws = draws

    def has(self, index: int) -> bool:
        return index in self.committed

    def draws(self, prompt: Prompt) -> tuple[Draw, ...]:
        return self._draws(prompt)

    def commit(self, index: int, sampled: list[Sampled], dropped: list[Dropped], engine: base.Engine) -> None:
        assert index not in self.committed
        self.committed[index] = sampled
        self.dropped[index] = dropped
        self.taken_at_commit.append(getattr(engine, "taken", 0))


def sample(missing: Sequence[Shard], engine: base.Engine, work: Recorder, chat: Chat, out: Path) -> int:
    """As a run does it; a prompt is tokenised as its first letter."""
    inflight = Inflight.load(out)

    def prepare(prompt: Prompt) -> list[int]:
        if prompt.prompt_id in inflight.killers:
            raise RowFault("engine_died", "twice")
        return tokens_of(prompt)

    with inflight.recording():
        return sampling.sample_shards(
            lambda: iter(missing), prepare, engine, work, chat, inflight, lambda amount, note="": None
        )


def shuffled(seed: int, in_flight: int, **changes: Any) -> ScriptedEngine:
    """Every completion is the prompt's ids and an end; requests leave in random order."""

    def sample(request: Request) -> list[Sample]:
        ids = [*request.prompt_token_ids, 2]
        return [Sample(d.sample_index, ids, [0.0] * len(ids), "stop") for d in request.draws]

    return ScriptedEngine(sample, lambda s, _: [0.0] * len(s.token_ids), in_flight=in_flight, seed=seed, **changes)


def prompt(text: str, answer: str | None = None) -> Prompt:
    messages = [Message(role="user", content=text)]
    return Prompt(content_id(messages, answer), messages, answer, "train", "", "{}")


def tokens_of(prompt: Prompt) -> list[int]:
    return [5 + int(prompt.messages[0]["content"]) % 200]


def prompts(number: int) -> list[Prompt]:
    return [prompt(str(i)) for i in range(number)]


def cut(given_: Sequence[Prompt], rows: int) -> list[Shard]:
    return list(sampling.cut(given_, rows, set(range(-(-len(given_) // rows)))))


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 12), st.integers(0, 1000))
def test_shards_commit_whole_once_and_in_prompt_order(
    chat: Chat, tmp_path: Path, number: int, rows: int, in_flight: int, seed: int
) -> None:
    """Every shard is committed once, with its prompts in their order and every prompt with its own samples."""
    given_ = prompts(number)
    work = Recorder()
    tokens = sample(cut(given_, rows), shuffled(seed, in_flight), work, chat, tmp_path)
    assert sorted(work.committed) == list(range(-(-number // rows)))
    in_order = [s for i in sorted(work.committed) for s in work.committed[i]]
    assert [s.ready for s in in_order] == [Ready(p, tokens_of(p)) for p in given_]
    for sampled in in_order:
        assert [s.token_ids for s in sampled.samples] == [[*sampled.ready.token_ids, 2]] * 2
        assert sampled.texts == [chat.decode([*sampled.ready.token_ids, 2])] * 2
    assert tokens == number * 2 * 2


def test_a_shard_commits_as_soon_as_it_is_whole(chat: Chat, tmp_path: Path) -> None:
    """One request in flight: shard 0 (two prompts) is committed before the third prompt is asked for."""
    work = Recorder()
    sample(cut(prompts(6), 2), shuffled(0, 1), work, chat, tmp_path)
    assert work.taken_at_commit == [2, 4, 6]


def test_only_the_given_shards_are_sampled(chat: Chat, tmp_path: Path) -> None:
    """Resume passes the missing ones under their own numbers."""
    found = cut(prompts(9), 3)
    work, engine = Recorder(), shuffled(0, 4)
    sample([found[0], found[2]], engine, work, chat, tmp_path)
    assert sorted(work.committed) == [0, 2]
    assert engine.taken == 6


def test_prompts_are_cut_into_numbered_shards_of_which_only_the_wanted_are_kept() -> None:
    given_ = prompts(7)
    assert cut(given_, 3) == [(0, given_[:3]), (1, given_[3:6]), (2, given_[6:])]
    assert list(sampling.cut(iter(given_), 3, {0, 2})) == [(0, given_[:3]), (2, given_[6:])]
    assert list(sampling.cut(given_, 3, set())) == []


def test_a_shard_is_tokenised_when_the_engine_asks_for_it(chat: Chat, tmp_path: Path) -> None:
    """Ten shards of two prompts, three requests in flight: never more than the shards in flight and the next one are
    tokenised, though all twenty prompts are."""
    tokenised = 0
    ahead: list[int] = []

    def prepare(prompt: Prompt) -> list[int]:
        nonlocal tokenised
        tokenised += 1
        return tokens_of(prompt)

    engine = shuffled(0, 3)

    def sample(request: Request) -> list[Sample]:
        ahead.append(tokenised - engine.taken)
        return plain(request)

    plain, engine.sample = engine.sample, sample
    inflight = Inflight.load(tmp_path)
    with inflight.recording():
        sampling.sample_shards(
            lambda: sampling.cut(prompts(20), 2, set(range(10))), prepare, engine, Recorder(), chat, inflight,
            lambda amount, note="": None,
        )  # fmt: skip
    assert tokenised == 20
    assert len(ahead) == 20
    assert max(ahead) <= 1


def test_a_prompt_that_cannot_be_sampled_is_handed_over_with_its_shard(chat: Chat, tmp_path: Path) -> None:
    """Prompts 0 and 1 are the whole of shard 0, which is committed without a sample; 4 is one of two."""
    faulty = {"0", "1", "4"}

    def prepare(prompt: Prompt) -> list[int]:
        if (text := prompt.messages[0]["content"]) in faulty:
            raise RowFault("too_long", f"prompt {text}")
        return tokens_of(prompt)

    work, inflight = Recorder(), Inflight.load(tmp_path)
    done: list[float] = []
    with inflight.recording():
        sampling.sample_shards(
            lambda: cut(prompts(6), 2), prepare, shuffled(0, 3), work, chat, inflight,
            lambda amount, note="": done.append(amount),
        )  # fmt: skip
    kept = {i: [s.ready.prompt.messages[0]["content"] for s in own] for i, own in work.committed.items()}
    assert kept == {0: [], 1: ["2", "3"], 2: ["5"]}
    assert {i: [d.detail for d in own] for i, own in work.dropped.items()} == {
        0: ["prompt 0", "prompt 1"], 1: [], 2: ["prompt 4"],
    }  # fmt: skip
    assert sum(done) == 6


def test_draws_are_asked_for_by_prompt(chat: Chat, tmp_path: Path) -> None:
    given_ = prompts(3)
    work = Recorder(lambda p: DRAWS[: 1 + (p is given_[1])])
    sample(cut(given_, 3), shuffled(3, 3), work, chat, tmp_path)
    seen = [(s.ready.prompt.messages[0]["content"], len(s.samples)) for s in work.committed[0]]
    assert seen == [("0", 1), ("1", 2), ("2", 1)]


def dying(poison: str, in_flight: int) -> ScriptedEngine:
    """Fails as soon as it is given a prompt of one id."""

    def admit(work: Request | ScoreRequest) -> bool:
        if isinstance(work, Request) and work.prompt_id == poison:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return True

    return shuffled(0, in_flight, admit=admit)


def test_a_prompt_that_kills_the_engine_twice_is_left_out_and_the_others_are_not(chat: Chat, tmp_path: Path) -> None:
    """First death: three prompts were inside. Second: they run alone, so the one that kills is known. Third: done."""
    given_ = prompts(8)
    poison = given_[4].prompt_id
    found = cut(given_, 2)
    work = Recorder()
    for expected in (3, 1):
        with pytest.raises(
            PrefpipeError, match=rf"the engine died while it worked on {expected} prompts: RuntimeError"
        ):
            sample([s for s in found if not work.has(s[0])], dying(poison, 3), work, chat, tmp_path)
    inflight = Inflight.load(tmp_path)
    assert inflight.killers == [poison]
    sample([s for s in found if not work.has(s[0])], dying(poison, 3), work, chat, tmp_path)
    assert sorted(work.committed) == [0, 1, 2, 3]
    kept = [s.ready.prompt for i in sorted(work.committed) for s in work.committed[i]]
    assert kept == [p for p in given_ if p.prompt_id != poison]
    assert [(d.id, d.reason) for own in work.dropped.values() for d in own] == [(poison, "engine_died")]
