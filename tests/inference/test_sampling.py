"""Prompts to samples, shard by shard: whole ones only, prompts in their order, whatever order an engine finishes in."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefpipe.engines import base
from prefpipe.engines.base import Draw, Request, Sample
from prefpipe.errors import PrefpipeError, RowFault
from prefpipe.ids import content_id
from prefpipe.inference import sampling
from prefpipe.inference.inflight import Inflight
from prefpipe.inference.sampling import Draws, EncodedPrompt, PromptShard, SampledShard
from prefpipe.models.chat import Chat
from prefpipe.models.thinking import Said
from prefpipe.schemas import Message, Prompt
from tests.engines.cases import ScriptedEngine

DRAWS = (Draw(0, 1, 1.0), Draw(1, 2, 1.0))


def sample(
    missing: Sequence[PromptShard],
    engine: base.Engine,
    chat: Chat,
    out: Path,
    draws: Draws = lambda _prompt: DRAWS,
) -> Iterator[SampledShard]:
    """As a run does it; a prompt is tokenised as its first letter."""
    inflight = Inflight.load(out)

    def encode(prompt: Prompt) -> list[int]:
        if prompt.prompt_id in inflight.killers:
            raise RowFault("engine_died", "twice")
        return tokens_of(prompt)

    with inflight.recording():
        last = sampling.last_suspect(missing, inflight.suspects)
        yield from sampling.sample_shards(
            iter(missing), encode, draws, engine, chat, inflight, lambda amount, note="": None, last
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


def cut(some: Sequence[Prompt], rows: int) -> list[PromptShard]:
    return list(sampling.cut(some, rows, set(range(-(-len(some) // rows)))))


@settings(deadline=None, max_examples=50, suppress_health_check=[*HealthCheck])
@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 12), st.integers(0, 1000))
def test_shards_come_back_whole_once_and_in_prompt_order(
    chat: Chat, tmp_path: Path, number: int, rows: int, in_flight: int, seed: int
) -> None:
    """Every shard comes back once, with its prompts in their order and every prompt with its own samples."""
    shards = list(sample(cut(prompts(number), rows), shuffled(seed, in_flight), chat, tmp_path))
    shards.sort(key=lambda shard: shard.index)
    assert [shard.index for shard in shards] == list(range(-(-number // rows)))
    in_order = [s for shard in shards for s in shard.sampled]
    assert [s.encoded for s in in_order] == [EncodedPrompt(p, tokens_of(p)) for p in prompts(number)]
    for sampled in in_order:
        assert [s.token_ids for s in sampled.samples] == [[*sampled.encoded.token_ids, 2]] * 2
        assert sampled.said == [Said(chat.decode([*sampled.encoded.token_ids, 2]))] * 2


def test_a_shard_comes_back_as_soon_as_it_is_whole(chat: Chat, tmp_path: Path) -> None:
    """One request in flight: shard 0 (two prompts) comes back before the third prompt is asked for."""
    engine = shuffled(0, 1)
    assert [engine.taken for _ in sample(cut(prompts(6), 2), engine, chat, tmp_path)] == [2, 4, 6]


def test_only_the_missing_shards_are_sampled(chat: Chat, tmp_path: Path) -> None:
    """Resume passes the missing ones under their own numbers."""
    shards = cut(prompts(9), 3)
    engine = shuffled(0, 4)
    assert {shard.index for shard in sample([shards[0], shards[2]], engine, chat, tmp_path)} == {0, 2}
    assert engine.taken == 6


def test_prompts_are_cut_into_numbered_shards_of_which_only_the_wanted_are_kept() -> None:
    some = prompts(7)
    assert cut(some, 3) == [(0, some[:3]), (1, some[3:6]), (2, some[6:])]
    assert list(sampling.cut(iter(some), 3, {0, 2})) == [(0, some[:3]), (2, some[6:])]
    assert list(sampling.cut(some, 3, set())) == []


def test_a_shard_is_tokenised_when_the_engine_asks_for_it(chat: Chat, tmp_path: Path) -> None:
    """Ten shards of two prompts, three requests in flight: never more than the shards in flight and the next one are
    tokenised, though all twenty prompts are."""
    tokenised = 0
    ahead: list[int] = []

    def encode(prompt: Prompt) -> list[int]:
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
        shards = sampling.sample_shards(
            sampling.cut(prompts(20), 2, set(range(10))),
            encode,
            lambda _prompt: DRAWS,
            engine,
            chat,
            inflight,
            lambda amount, note="": None,
        )
        assert len(list(shards)) == 10
    assert tokenised == 20
    assert len(ahead) == 20
    assert max(ahead) <= 1


def test_a_prompt_that_cannot_be_sampled_comes_back_with_its_shard(chat: Chat, tmp_path: Path) -> None:
    """Prompts 0 and 1 are the whole of shard 0, which comes back without a sample; 4 is one of two."""
    faulty = {"0", "1", "4"}

    def encode(prompt: Prompt) -> list[int]:
        if (text := prompt.messages[0]["content"]) in faulty:
            raise RowFault("too_long", f"prompt {text}")
        return tokens_of(prompt)

    inflight = Inflight.load(tmp_path)
    done: list[float] = []
    with inflight.recording():
        shards = list(
            sampling.sample_shards(
                cut(prompts(6), 2),
                encode,
                lambda _prompt: DRAWS,
                shuffled(0, 3),
                chat,
                inflight,
                lambda amount, note="": done.append(amount),
            )
        )
    kept = {shard.index: [s.encoded.prompt.messages[0]["content"] for s in shard.sampled] for shard in shards}
    assert kept == {0: [], 1: ["2", "3"], 2: ["5"]}
    assert {shard.index: [d.detail for d in shard.dropped] for shard in shards} == {
        0: ["prompt 0", "prompt 1"],
        1: [],
        2: ["prompt 4"],
    }
    assert sum(done) == 6


def test_draws_are_asked_for_by_prompt(chat: Chat, tmp_path: Path) -> None:
    some = prompts(3)
    (shard,) = sample(cut(some, 3), shuffled(3, 3), chat, tmp_path, lambda p: DRAWS[: 1 + (p is some[1])])
    seen = [(s.encoded.prompt.messages[0]["content"], len(s.samples)) for s in shard.sampled]
    assert seen == [("0", 1), ("1", 2), ("2", 1)]


def dying(poison: str, in_flight: int) -> ScriptedEngine:
    """Fails as soon as it gets the prompt of one id."""

    def admit(work: Request | base.ScoreRequest) -> bool:
        if isinstance(work, Request) and work.prompt_id == poison:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return True

    return shuffled(0, in_flight, admit=admit)


def test_a_prompt_that_kills_the_engine_twice_is_left_out_and_the_others_are_not(chat: Chat, tmp_path: Path) -> None:
    """First death: three prompts were inside. Second: they run alone, so the one that kills is known. Third: done."""
    some = prompts(8)
    poison = some[4].prompt_id
    committed: dict[int, SampledShard] = {}

    def attempt() -> None:
        missing = [shard for shard in cut(some, 2) if shard[0] not in committed]
        for shard in sample(missing, dying(poison, 3), chat, tmp_path):
            assert shard.index not in committed
            committed[shard.index] = shard

    for expected in (3, 1):
        with pytest.raises(
            PrefpipeError, match=rf"the engine died while it worked on {expected} prompts: RuntimeError"
        ):
            attempt()
    assert Inflight.load(tmp_path).killers == [poison]
    attempt()
    assert sorted(committed) == [0, 1, 2, 3]
    kept = [s.encoded.prompt for i in sorted(committed) for s in committed[i].sampled]
    assert kept == [p for p in some if p.prompt_id != poison]
    assert [(d.id, d.reason) for shard in committed.values() for d in shard.dropped] == [(poison, "engine_died")]


def test_suspects_run_first_and_alone(chat: Chat, tmp_path: Path) -> None:
    """Prompts 3 and 4 were inside, and one that is committed meanwhile; its shard is not among the missing ones."""
    some = prompts(6)
    lines = [f"take {p.prompt_id}" for p in (some[3], some[4], prompt("99"))]
    (tmp_path / "inflight.log").write_text("\n".join(["start", *lines, ""]))
    list(sample(cut(some, 2), shuffled(0, 3), chat, tmp_path))
    log = (tmp_path / "inflight.log").read_text().splitlines()
    entered = [line for line in log[len(lines) + 2 :] if not line.startswith("done")]
    alone, others = [some[3], some[4]], [some[0], some[1], some[2], some[5]]
    assert entered == [
        *(f"alone {p.prompt_id}" for p in alone),
        *(f"take {p.prompt_id}" for p in others),
        "stopped",
    ]
