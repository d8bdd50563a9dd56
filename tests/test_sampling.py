"""Prompts to shards: whole ones only, in their order, whatever order an engine finishes in."""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefpipe import chat as chats
from prefpipe import engines, fsio, generate, models, sampling, store
from prefpipe.chat import Chat
from prefpipe.config.generate import GenerateConfig
from prefpipe.engines import base
from prefpipe.engines.base import Draw, EngineSettings, Request, Sample
from prefpipe.errors import DataError, PrefpipeError, UsageError
from prefpipe.ids import content_id
from prefpipe.inflight import Inflight
from prefpipe.ingest import read_prompts
from prefpipe.rewards import rules
from prefpipe.rewards.base import Answer, Scored
from prefpipe.sampling import Ready, Sampled
from prefpipe.schemas import Message, Prompt
from tests.e2e import letters

LETTERS = "tests.e2e.letters:most_letters"
DRAWS = (Draw(0, 1, 1.0), Draw(1, 2, 1.0))


class Recorder:
    """A stage that remembers what it was given."""

    def __init__(self, draws: Callable[[Prompt], tuple[Draw, ...]] = lambda _prompt: DRAWS) -> None:
        self.committed: dict[int, list[Sampled]] = {}
        self.taken_at_commit: list[int] = []
        self._draws = draws

    def has(self, index: int) -> bool:
        return index in self.committed

    def draws(self, prompt: Prompt) -> tuple[Draw, ...]:
        return self._draws(prompt)

    def commit(self, index: int, sampled: list[Sampled], engine: base.Engine) -> None:
        assert index not in self.committed
        self.committed[index] = sampled
        self.taken_at_commit.append(getattr(engine, "taken", 0))


def sample(
    shards: Sequence[tuple[int, Sequence[Ready]]], engine: base.Engine, work: Recorder, chat: Chat, out: Path
) -> int:
    inflight = Inflight.load(out)
    with inflight.recording():
        return sampling.sample_shards(shards, engine, work, chat, inflight)


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


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 12), st.integers(0, 1000))
def test_shards_commit_whole_once_and_in_prompt_order(
    chat: Chat, tmp_path: Path, number: int, rows: int, in_flight: int, seed: int
) -> None:
    """Every shard is committed once, with its prompts in their order and every prompt with its own samples."""
    given_ = ready(number)
    work = Recorder()
    tokens = sample(sampling.shard(given_, rows), ShuffledEngine(seed, in_flight), work, chat, tmp_path)
    assert sorted(work.committed) == list(range(-(-number // rows)))
    assert [s.ready for i in sorted(work.committed) for s in work.committed[i]] == given_
    for sampled in (s for shard in work.committed.values() for s in shard):
        assert [s.token_ids for s in sampled.samples] == [[*sampled.ready.token_ids, 2]] * 2
        assert sampled.texts == [chat.decode([*sampled.ready.token_ids, 2])] * 2
    assert tokens == number * 2 * 2


def test_a_shard_commits_as_soon_as_it_is_whole(chat: Chat, tmp_path: Path) -> None:
    """One request in flight: shard 0 (two prompts) is committed before the third prompt is asked for."""
    work = Recorder()
    sample(sampling.shard(ready(6), 2), ShuffledEngine(0, 1), work, chat, tmp_path)
    assert work.taken_at_commit == [2, 4, 6]


def test_only_the_given_shards_are_sampled(chat: Chat, tmp_path: Path) -> None:
    """Resume passes the missing ones under their own numbers."""
    shards = sampling.shard(ready(9), 3)
    work, engine = Recorder(), ShuffledEngine(0, 4)
    sample([shards[0], shards[2]], engine, work, chat, tmp_path)
    assert sorted(work.committed) == [0, 2]
    assert engine.taken == 6


def test_draws_are_asked_for_by_prompt(chat: Chat, tmp_path: Path) -> None:
    given_ = ready(3)
    work = Recorder(lambda p: DRAWS[: 1 + (p is given_[1].prompt)])
    sample(sampling.shard(given_, 3), ShuffledEngine(3, 3), work, chat, tmp_path)
    seen = [(s.ready.prompt.messages[0]["content"], len(s.samples)) for s in work.committed[0]]
    assert seen == [("0", 1), ("1", 2), ("2", 1)]


class DyingEngine(ShuffledEngine):
    """Fails as soon as it is given a prompt of one id."""

    def __init__(self, poison: str, in_flight: int) -> None:
        super().__init__(0, in_flight)
        self._poison = poison

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Sample]]]:
        def watched() -> Iterator[Request]:
            for request in requests:
                if request.prompt_id == self._poison:
                    raise RuntimeError("CUDA error: device-side assert triggered")
                yield request

        return super().generate(watched())


def test_a_prompt_that_kills_the_engine_twice_is_left_out_and_the_others_are_not(chat: Chat, tmp_path: Path) -> None:
    """First death: three prompts were inside. Second: they run alone, so the one that kills is known. Third: done."""
    given_ = ready(8)
    poison = given_[4].prompt.prompt_id
    shards = sampling.shard(given_, 2)
    work = Recorder()
    for expected in (3, 1):
        with pytest.raises(
            PrefpipeError, match=rf"the engine died while it worked on {expected} prompts: RuntimeError"
        ):
            sample([s for s in shards if not work.has(s[0])], DyingEngine(poison, 3), work, chat, tmp_path)
    inflight = Inflight.load(tmp_path)
    assert inflight.killers == [poison]
    sample([s for s in shards if not work.has(s[0])], DyingEngine(poison, 3), work, chat, tmp_path)
    assert sorted(work.committed) == [0, 1, 2, 3]
    kept = [s.ready for i in sorted(work.committed) for s in work.committed[i]]
    assert kept == [r for r in given_ if r.prompt.prompt_id != poison]


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
    assert dropped[0].detail == "69 tokens in the prompt, the most is 40"
    assert "3 of 5 prompts dropped" in capsys.readouterr().err


def test_no_prompt_left_is_an_error_with_the_reasons(chat: Chat) -> None:
    with pytest.raises(DataError, match=r"all 2 were dropped \(empty, too_long\)"):
        sampling.prepare([prompt("x" * 50), prompt(" ")], chat, max_prompt_tokens=40, control_tokens="drop")


def test_engine_settings_carry_every_setting_of_sampling(tiny_model: Path, prompts_file: Path) -> None:
    config = GenerateConfig(
        model=str(tiny_model), prompts=str(prompts_file), engine="fake", dtype="float32", top_p=0.9, top_k=7, min_p=0.1,
        max_tokens=12, stop_token_ids=(9,), max_num_seqs=3, kv_cache_mib=64, tensor_parallel_size=2,
        gpu_memory_utilization=0.5,
    )  # fmt: skip
    task = sampling.read_task(config, ())
    found = sampling.engine_settings(task, config, 42)
    assert found == EngineSettings(task.policy, task.chat, "float32", 0.9, 12, 42, 3, 64, 7, 0.1, (9,), 2, 0.5)
    assert found.stops == {2, 9}


def test_a_prompt_that_leaves_no_room_for_the_completion_is_dropped(
    tiny_model: Path, tmp_path: Path, chat: Chat
) -> None:
    """The context is 1024 tokens, max_tokens 100, and scoring asks for one more: 923 are left for a prompt."""
    path = tmp_path / "p.jsonl"
    sizes = {n: 19 + n for n in (904, 905)}
    path.write_text("".join(json.dumps({"prompt": "x" * n}) + "\n" for n in sizes))
    config = GenerateConfig(
        model=str(tiny_model), prompts=str(path), engine="fake", max_tokens=100, max_prompt_tokens=2000, num_samples=1
    )
    manifest = generate.run(config, tmp_path / "g", force=False)
    assert manifest["totals"]["prompts"] == 1
    (row,) = store.read_parquet(tmp_path / "g" / "dropped.parquet").to_pylist()
    assert (row["reason"], row["detail"]) == ("too_long", "924 tokens in the prompt, the most is 923")


@pytest.mark.parametrize("count", [1, 3, 4])
def test_parts_are_disjoint_and_together_they_are_the_whole(tiny_model: Path, prompts_file: Path, count: int) -> None:
    def ids(part: str) -> list[str]:
        config = GenerateConfig(model=str(tiny_model), prompts=str(prompts_file), engine="fake", part=part)
        return [p.prompt_id for p in sampling.read_task(config, ()).prompts]

    everything, _ = read_prompts(prompts_file, "train", 0)
    parts = [ids(f"{i}/{count}") for i in range(1, count + 1)]
    assert sorted(i for part in parts for i in part) == sorted(p.prompt_id for p in everything)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(UsageError, match=rf"part = '{count + 1}/{count}': there are only {count} parts"):
        ids(f"{count + 1}/{count}")


def test_a_reward_sees_prompt_answer_and_text_and_comes_back_in_order() -> None:
    """Two prompts with two samples and one."""
    sampled = [
        Sampled(Ready(prompt("q", "a"), [1]), [_sample(0), _sample(1)], ["one", "two"]),
        Sampled(Ready(prompt("r"), [1]), [_sample(0)], ["three"]),
    ]

    def reward(answers: Sequence[Answer]) -> list[Scored]:
        return [Scored(float(len(a.text)), "ok", f"{a.messages[0]['content']} {a.answer}") for a in answers]

    scores = sampling.rate(sampling.answers_of(sampled), reward, "length")
    assert [(s.reward, s.detail) for s in scores] == [(3, "q a"), (3, "q a"), (5, "r None")]
    assert sampling.rate([], reward, "length") == []


def test_a_reward_that_crashes_on_all_rows_is_an_error_on_some_it_is_recorded() -> None:
    sampled = [Sampled(Ready(prompt("q"), [1]), [_sample(0), _sample(1)], ["good", "bad"])]
    answers = sampling.answers_of(sampled)

    def crash(answers: Sequence[Answer]) -> list[Scored]:
        return [Scored(None, "crash", "no such file")] * len(answers)

    def partly(answers: Sequence[Answer]) -> list[Scored]:
        return [Scored(1.0) if a.text == "good" else Scored(None, "crash", "no such file") for a in answers]

    with pytest.raises(DataError, match="reward mine failed on all 2 completions: no such file"):
        sampling.rate(answers, crash, "mine")
    assert sampling.rate(answers, partly, "mine") == [Scored(1.0), Scored(None, "crash", "no such file")]


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


def _sample(index: int) -> Sample:
    return Sample(index, [5, 2], [-1.0, -1.0], "stop")
