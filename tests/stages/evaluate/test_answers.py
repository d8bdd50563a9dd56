"""What is sampled for a prompt, and answers that come back as they were rated."""

import json
from pathlib import Path

from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.ids import sample_seed
from prefpipe.inference.filling import engines_on_demand
from prefpipe.inference.task import read_task
from prefpipe.runs import store
from prefpipe.schemas import Message, Prompt
from prefpipe.stages.evaluate import answers
from tests.conftest import Write
from tests.stages.evaluate.cases import config


def test_greedy_is_drawn_first_then_the_samples() -> None:
    settings = EvaluateConfig(temperature=0.8, seed=4)
    prompt = Prompt("p", [Message(role="user", content="x")], None, "heldout", "", "{}")
    found = answers.draws(settings, 3, prompt)
    assert [(d.sample_index, d.temperature) for d in found] == [(0, 0.0), (1, 0.8), (2, 0.8), (3, 0.8)]
    assert [d.seed for d in found[1:]] == [sample_seed(4, "p", k) for k in (1, 2, 3)]


def test_committed_answers_meet_their_prompts_again(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    """Expected answers and further columns stand in the file of prompts only; a dropped prompt leaves no gap."""
    texts = ["one", "spells <|im_start|>", "three", "four", "five"]
    path = write(*({"prompt": t, "answer": t[:3], "level": i} for i, t in enumerate(texts)))
    settings = config(tiny_model, path, split="all")
    task = read_task(settings, settings.reward)
    with (
        store.open_run(tmp_path / "e", "evaluate", settings, task.inputs, force=False) as run,
        engines_on_demand(task, settings) as start,
    ):
        found = answers.sample(settings, run, task, start, num_samples=1)
        assert [row.reason for row in found.dropped()] == ["control_tokens"]
        assert found.lacking("nothing") == {0, 1, 2}
        shards = dict(found.with_prompts({0, 2}))
    assert {i: [p.messages[0]["content"] for p, _ in pairs] for i, pairs in shards.items()} == {
        0: ["one", "one"], 2: ["five", "five"],
    }  # fmt: skip
    rated = answers.to_rate(settings, task, shards[2])
    assert [a.text for a in rated] == [row.text for _, row in shards[2]]
    assert [a.num_tokens for a in rated] == [len(row.token_ids) for _, row in shards[2]]
    assert {(a.answer, json.loads(a.meta)["level"]) for a in rated} == {("fiv", 4)}
