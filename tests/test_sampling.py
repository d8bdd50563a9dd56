"""Prompts to shards: whole ones only, in their order, whatever order an engine finishes in."""

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe import chat as chats
from prefpipe import engines, fsio, models, sampling
from prefpipe.chat import Chat
from prefpipe.engines import base
from prefpipe.engines.base import Draw, EngineSettings, Request, Sample
from prefpipe.errors import DataError
from prefpipe.ids import content_id
from prefpipe.rewards import rules
from prefpipe.rewards.base import Answer, Scored
from prefpipe.sampling import Ready, Sampled
from prefpipe.schemas import Message, Prompt
from tests.e2e import letters

LETTERS = "tests.e2e.letters:most_letters"
DRAWS = (Draw(0, 1, 1.0), Draw(1, 2, 1.0))


class ShuffledEngine:
    """Finishes requests in random order; `in_flight` requests are taken before the first one is done."""

    scorer = "shuffled"

    def __init__(self, seed: int, in_flight: int) -> None:
        self._source = random.Random(seed)
        self._in_flight = in_flight
        self.taken = 0

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Sample]]]:
        waiting: list[Request] = []
        for request in requests:
            self.taken += 1
            waiting.append(request)
            if len(waiting) == self._in_flight:
                yield self._finish(waiting)
        while waiting:
            yield self._finish(waiting)

    def score(self, sequences: Iterable[base.Sequence], *, adapter: bool) -> Iterator[tuple[str, list[float]]]:
        yield from ((s.completion_id, [0.0] * len(s.token_ids)) for s in sequences)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def _finish(self, waiting: list[Request]) -> tuple[Request, list[Sample]]:
        request = waiting.pop(self._source.randrange(len(waiting)))
        ids = [*request.prompt_token_ids, 2]
        return request, [Sample(d.sample_index, ids, [0.0] * len(ids), "stop") for d in request.draws]


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> Chat:
    return chats.load(tiny_model)


def prompt(text: str, answer: str | None = None) -> Prompt:
    messages = [Message(role="user", content=text)]
    return Prompt(content_id(messages, answer), messages, answer, "train", "", "{}")


def ready(number: int) -> list[Ready]:
    return [Ready(prompt(str(i)), [5 + i % 200]) for i in range(number)]


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 12), st.integers(0, 1000))
def test_shards_commit_whole_once_and_in_prompt_order(number: int, rows: int, in_flight: int, seed: int) -> None:
    """Every shard is committed once, with its prompts in their order and every prompt with its own samples."""
    given_ = ready(number)
    shards = sampling.shard(given_, rows)
    committed: dict[int, list[Sampled]] = {}

    def commit(index: int, sampled: list[Sampled]) -> None:
        assert index not in committed
        committed[index] = sampled

    tokens = sampling.sample_shards(shards, ShuffledEngine(seed, in_flight), lambda _p: DRAWS, commit)
    assert sorted(committed) == list(range(-(-number // rows)))
    assert [s.ready for i in sorted(committed) for s in committed[i]] == given_
    for sampled in (s for shard in committed.values() for s in shard):
        assert [s.token_ids for s in sampled.samples] == [[*sampled.ready.token_ids, 2]] * 2
    assert tokens == number * 2 * 2


def test_a_shard_commits_as_soon_as_it_is_whole() -> None:
    """One request in flight: shard 0 (two prompts) is committed before the third prompt is asked for."""
    engine = ShuffledEngine(0, 1)
    taken_at_commit: list[int] = []
    shards = sampling.shard(ready(6), 2)
    sampling.sample_shards(shards, engine, lambda _p: DRAWS, lambda _i, _s: taken_at_commit.append(engine.taken))
    assert taken_at_commit == [2, 4, 6]


def test_only_the_given_shards_are_sampled() -> None:
    """Resume passes the missing ones under their own numbers."""
    shards = sampling.shard(ready(9), 3)
    committed: list[int] = []
    engine = ShuffledEngine(0, 4)
    sampling.sample_shards([shards[0], shards[2]], engine, lambda _p: DRAWS, lambda i, _s: committed.append(i))
    assert sorted(committed) == [0, 2]
    assert engine.taken == 6


def test_draws_are_asked_for_by_prompt() -> None:
    given_ = ready(3)
    seen: list[tuple[str, int]] = []

    def commit(_index: int, sampled: list[Sampled]) -> None:
        seen.extend((s.ready.prompt.messages[0]["content"], len(s.samples)) for s in sampled)

    sampling.sample_shards(
        sampling.shard(given_, 3), ShuffledEngine(3, 3), lambda p: DRAWS[: 1 + (p is given_[1].prompt)], commit
    )
    assert seen == [("0", 1), ("1", 2), ("2", 1)]


def test_prepare_keeps_good_prompts_and_explains_the_others(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    """'<|im_start|>user\\n' + text + '<|im_end|>\\n<|im_start|>assistant\\n' has 19 tokens beside the text's bytes."""
    prompts = [prompt("good"), prompt("x" * 50), prompt(" "), prompt("a<|im_end|>"), prompt("also good")]
    good, dropped = sampling.prepare(prompts, chat, max_prompt_tokens=40, control_tokens="drop")
    assert [(r.prompt, len(r.token_ids)) for r in good] == [(prompts[0], 19 + 4), (prompts[4], 19 + 9)]
    assert [(d.id, d.reason) for d in dropped] == [
        (prompts[1].prompt_id, "too_long"),
        (prompts[2].prompt_id, "empty"),
        (prompts[3].prompt_id, "control_tokens"),
    ]
    assert dropped[0].detail == "69 tokens, max_prompt_tokens is 40"
    assert "3 of 5 prompts dropped" in capsys.readouterr().err


def test_no_prompt_left_is_an_error_with_the_reasons(chat: Chat) -> None:
    with pytest.raises(DataError, match=r"all 2 were dropped \(empty, too_long\)"):
        sampling.prepare([prompt("x" * 50), prompt(" ")], chat, max_prompt_tokens=40, control_tokens="drop")


def test_the_engine_has_room_for_the_longest_prompt_and_a_full_completion(chat: Chat, tiny_model: Path) -> None:
    given_ = [Ready(prompt("a"), [1] * 7), Ready(prompt("b"), [1] * 30), Ready(prompt("c"), [1])]
    settings = sampling.engine_settings(
        models.resolve(str(tiny_model)), chat, given_, dtype="float32", top_p=0.9, max_tokens=12, max_num_seqs=3,
        kv_cache_mib=64,
    )  # fmt: skip
    assert settings.max_model_len == 30 + 12
    assert settings == EngineSettings(settings.policy, chat, "float32", 0.9, 12, 42, 3, 64)


def test_a_reward_sees_prompt_answer_and_text_and_comes_back_per_prompt(chat: Chat) -> None:
    """Two prompts with two samples and one: the scores keep that shape; the end of sequence is no text."""
    sampled = [
        Sampled(Ready(prompt("q", "a"), [1]), [_sample(chat, 0, "one"), _sample(chat, 1, "two")]),
        Sampled(Ready(prompt("r"), [1]), [_sample(chat, 0, "three")]),
    ]

    def reward(answers: Sequence[Answer]) -> list[Scored]:
        return [Scored(float(len(a.text)), "ok", f"{a.messages[0]['content']} {a.answer}") for a in answers]

    scores = sampling.rate(sampled, chat, reward, "length")
    assert [[(s.reward, s.detail) for s in own] for own in scores] == [[(3, "q a"), (3, "q a")], [(5, "r None")]]


def test_a_reward_that_crashes_on_all_rows_is_an_error_on_some_it_is_recorded(chat: Chat) -> None:
    sampled = [Sampled(Ready(prompt("q"), [1]), [_sample(chat, k, t) for k, t in enumerate(("good", "bad"))])]

    def crash(answers: Sequence[Answer]) -> list[Scored]:
        return [Scored(None, "crash", "no such file")] * len(answers)

    def partly(answers: Sequence[Answer]) -> list[Scored]:
        return [Scored(1.0) if a.text == "good" else Scored(None, "crash", "no such file") for a in answers]

    with pytest.raises(DataError, match="reward mine failed on all 2 completions: no such file"):
        sampling.rate(sampled, chat, crash, "mine")
    assert sampling.rate(sampled, chat, partly, "mine") == [[Scored(1.0), Scored(None, "crash", "no such file")]]


def test_rewards_are_loaded_by_name_and_identified_by_content() -> None:
    """The identity enters the fingerprint of a run: the file's digest for a user's own, a version for ours."""
    functions, ids = sampling.load_rewards([LETTERS, "short_sentence"])
    assert list(functions) == [LETTERS, "short_sentence"]
    assert ids == {
        f"reward {LETTERS}": fsio.file_digest(Path(letters.__file__)),
        "reward short_sentence": f"short_sentence-{rules.VERSION}",
    }


def test_starting_an_engine_says_so(chat: Chat, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = EngineSettings(models.resolve(str(tiny_model)), chat, "float32", 1.0, 8, 64, 2, 64)
    assert type(sampling.start_engine("fake", settings)).__name__ == "FakeEngine"
    assert "starting engine fake (tiny, float32)" in capsys.readouterr().err
    assert set(engines.ENGINES) == {"vllm", "transformers", "fake"}


def _sample(chat: Chat, index: int, text: str) -> Sample:
    ids = [*chats.encode(chat, text), 2]
    return Sample(index, ids, [-1.0] * len(ids), "stop")
