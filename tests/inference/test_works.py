"""What a worker gets survives the way there: rewards are loaded again, and are the same."""

import pickle
from pathlib import Path

import pytest

from prefpipe.config.rewards import Length
from prefpipe.engines.base import ScoreRequest
from prefpipe.errors import IdentityError
from prefpipe.inference import works
from prefpipe.inference.works import Lease, Rewards, Scoring
from prefpipe.rewards.base import Answer
from prefpipe.rewards.rating import load_rewards
from prefpipe.schemas import Message


def answer(text: str) -> Answer:
    return Answer([Message(role="user", content="x")], text, None, "{}", len(text))


def test_rewards_travel_by_name_and_rate_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(works, "_here", {})
    tables = {"mine": Length(min=3, max=5)}
    functions, _ = load_rewards(("mine", "short_sentence"), tables)
    there = pickle.loads(pickle.dumps(Rewards(functions, tables)))
    assert list(there.functions) == ["mine", "short_sentence"]
    answers = [answer(text) for text in ("a b c d", "a", "")]
    for name, function in functions.items():
        assert there.functions[name](answers) == function(answers)


def test_a_reward_that_is_another_one_there_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The file of a user's function has other bytes on the machine of the worker."""
    monkeypatch.setattr(works, "_here", {})
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "my_reward.py"
    file.write_text("def rate(completions, **_):\n    return [1.0] * len(completions)\n")
    sent = pickle.dumps(Rewards(load_rewards(("my_reward:rate",))[0]))
    pickle.loads(sent)
    file.write_text(file.read_text().replace("1.0", "0.0"))
    with pytest.raises(IdentityError, match="my_reward:rate is another one where a worker runs"):
        pickle.loads(sent)


def test_the_keys_of_completions_name_their_shard() -> None:
    """The same completion may stand in two shards, and be inside two engines."""
    requests = [ScoreRequest(name, [1], [2]) for name in ("a", "b")]
    scoring = Scoring(lambda content, _killers: content, lambda content: content, lambda *_: [])
    assert scoring.keys(Lease(3, requests)) == ["3/a", "3/b"]
    assert scoring.keys(Lease(4, requests[:1])) == ["4/a"]
