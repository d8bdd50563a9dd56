"""The fake engine: deterministic, honest about ends, and shaped like a real one."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from prefpipe.engines import load
from prefpipe.engines.base import Draw, Engine, EngineSettings, Query, Request, ScoreRequest
from prefpipe.engines.fake import FakeEngine
from prefpipe.models import policy
from prefpipe.models.chat import load_chat


def settings(model: Path, max_tokens: int = 200) -> EngineSettings:
    return EngineSettings(policy.resolve(str(model)), load_chat(model), "float32", 1.0, max_tokens, 1024, 4, 64)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return load("fake", settings(tiny_model))


def request(name: str, *seeds: int) -> Request:
    return Request(name, [1, 2, 3], tuple(Draw(k, seed, 1.0) for k, seed in enumerate(seeds)))


def test_a_sample_depends_on_its_seed_only(engine: Engine) -> None:
    (_, [alone]) = next(iter(engine.generate([request("a", 7)])))
    for (_, samples), position in zip(engine.generate([request("b", 7, 8), request("c", 9, 7)]), (0, 1), strict=True):
        again = samples[position]
        assert (again.token_ids, again.token_logps) == (alone.token_ids, alone.token_logps)
        assert samples[1 - position].token_ids != alone.token_ids


@limits(deadline=None)
@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5, unique=True), st.integers(1, 120))
def test_samples_end_as_those_of_a_real_engine(tiny_model: Path, seeds: list[int], max_tokens: int) -> None:
    """stop: the last id is the end of sequence; length: exactly max_tokens ids and no end; log-probs are below 0."""
    fake = FakeEngine(settings(tiny_model, max_tokens))
    ((request_, samples),) = fake.generate([request("a", *seeds)])
    assert [s.sample_index for s in samples] == [d.sample_index for d in request_.draws]
    for sample in samples:
        assert 1 <= len(sample.token_ids) <= max_tokens
        assert len(sample.token_logps) == len(sample.token_ids)
        assert all(v < 0 for v in sample.token_logps)
        if sample.finish_reason == "stop":
            assert sample.token_ids.index(2) == len(sample.token_ids) - 1
        else:
            assert sample.finish_reason == "length"
            assert len(sample.token_ids) == max_tokens
            assert 2 not in sample.token_ids


def test_an_answer_ends_as_the_template_ends_one(tiny_model: Path, tmp_path: Path) -> None:
    """Of several end-of-sequence tokens, as Llama 3 has them: <|endoftext|> is the first id, <|im_end|> ends a turn."""
    model = shutil.copytree(tiny_model, tmp_path / "m")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    (_, [sample]) = next(FakeEngine(settings(model)).generate([request("a", 7)]))
    assert sample.token_ids[-1] == 2
    plain = replace(settings(model), chat=load_chat(model, "none"))
    (_, [sample]) = next(FakeEngine(plain).generate([request("a", 7)]))
    assert sample.token_ids[-1] == 2  # plain text closes with the named one
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    (_, [sample]) = next(FakeEngine(settings(model)).generate([request("a", 7)]))
    assert sample.token_ids[-1] == 0  # nothing says which


def test_greedy_does_not_depend_on_the_seed(engine: Engine) -> None:
    given_ = [Request(str(s), [1], (Draw(0, s, 0.0),)) for s in range(3)]
    assert len({tuple(samples[0].token_ids) for _, samples in engine.generate(given_)}) == 1


def test_scoring_equals_what_sampling_captured_and_shifts_without_the_adapter(engine: Engine) -> None:
    """Adapter off: 1/8 nat less per token, so that a test can tell the two references apart."""
    ((_, samples),) = engine.generate([request("a", 1, 2)])
    given_ = [ScoreRequest(str(s.sample_index), [1, 2, 3], s.token_ids) for s in samples]
    on, off = dict(engine.score(given_, adapter=True)), dict(engine.score(given_, adapter=False))
    for sample in samples:
        assert on[str(sample.sample_index)] == sample.token_logps
        assert off[str(sample.sample_index)] == [v - 0.125 for v in sample.token_logps]


def test_with_a_mask_the_values_are_those_of_the_scored_tokens(engine: Engine) -> None:
    ids = [7, 8, 9, 10]
    given_ = [ScoreRequest("all", [1], ids), ScoreRequest("some", [1], ids, [True, False, False, True])]
    found = dict(engine.score(given_, adapter=True))
    assert found["some"] == [found["all"][0], found["all"][3]]


def test_requests_are_taken_one_by_one(engine: Engine) -> None:
    """A stream: the second request is not asked for before the first one is done."""
    taken: list[str] = []

    def stream() -> Iterator[Request]:
        for name in "abc":
            taken.append(name)
            yield request(name, 1)

    with engine as running:
        for number, (done, _) in enumerate(running.generate(stream()), start=1):
            assert done.prompt_id == taken[-1]
            assert len(taken) == number


def test_answers_follow_their_schema_with_the_keys_in_its_order(tiny_model: Path) -> None:
    """Free answers are texts; an answer depends on its prompt only, and is cut as any other at max_tokens."""
    schema = {
        "type": "object",
        "properties": {"reason": {"type": "string"}, "rating": {"type": "integer", "enum": [3, 5, 8]}},
    }
    chat, fake = load_chat(tiny_model), FakeEngine(settings(tiny_model))
    queries = [Query(str(n), [n], 0, 0.0, schema) for n in range(20)]
    found = {q.query_id: chat.decode(response.token_ids) for q, response in fake.respond(queries)}
    assert all(list(json.loads(text)) == ["reason", "rating"] for text in found.values())
    assert {json.loads(text)["rating"] for text in found.values()} == {3, 5, 8}
    assert {q.query_id: chat.decode(r.token_ids) for q, r in fake.respond(reversed(queries))} == found
    ((_, free),) = fake.respond([Query("a", [1], 7, 1.0, None)])
    ((_, (sample,)),) = fake.generate([request("a", 7)])
    assert (free.token_ids, free.finish_reason) == (sample.token_ids, "stop")
    ((_, cut),) = FakeEngine(settings(tiny_model, 5)).respond(queries[:1])
    assert (len(cut.token_ids), cut.finish_reason) == (5, "length")
