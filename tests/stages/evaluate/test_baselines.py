"""What may be a baseline, and what is read of it."""

import json
from pathlib import Path

import pytest

from prefpipe.errors import DataError, UsageError
from prefpipe.stages.evaluate import baselines
from prefpipe.stages.generate import stage as generate
from tests.conftest import Write
from tests.stages.evaluate.cases import config, prompts_file, rows_of, run

IDENTITY = "short_sentence-1"


def test_a_baseline_is_read_as_it_was_written(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    run(config(tiny_model, prompts_file(write, 3)), tmp_path / "a")
    found = baselines.read(str(tmp_path / "a"), "any name", IDENTITY)
    rows = rows_of(tmp_path / "a")
    assert found.policy == rows[0].policy
    answers = found.answers()
    assert {k: (o.reward, o.characters) for k, o in answers.items()} == {
        (r.prompt_id, r.sample_index): (r.reward, len(r.text)) for r in rows
    }
    for decoding in ("greedy", "sampled"):
        texts = {(r.prompt_id, r.sample_index): r.text for r in rows if r.decoding == decoding}
        greedy = decoding == "greedy"
        assert found.texts("answer", greedy=greedy) == found.texts("all", greedy=greedy) == texts
    assert (found.has("evaluations"), found.has("guards/x")) == (True, False)


def test_what_is_computed_beside_the_answers_changes_no_answers(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    path = prompts_file(write, 3)

    def answers_id(reward: tuple[str, ...]) -> str:
        run(config(tiny_model, path, reward=reward), tmp_path / "a")
        return baselines.read(str(tmp_path / "a"), "r", IDENTITY).answers_id

    assert answers_id(("short_sentence",)) == answers_id(("short_sentence", "length"))


def test_a_run_of_another_command_is_refused(tiny_model: Path, prompts_file: Path, tmp_path: Path) -> None:
    sampled = generate.GenerateConfig(model=str(tiny_model), prompts=str(prompts_file), engine="fake", check=0)
    generate.run(sampled, tmp_path / "g", force=False)
    with pytest.raises(UsageError, match="is a run of generate"):
        baselines.read(str(tmp_path / "g"), "r", IDENTITY)


def test_a_run_is_no_baseline_of_itself_nor_twice(tmp_path: Path) -> None:
    one, other = str(tmp_path / "a"), str(tmp_path / "b")
    baselines.check_apart([one, other], tmp_path / "c")
    with pytest.raises(UsageError, match="is this run itself"):
        baselines.check_apart([other, f"{tmp_path}/x/../a"], tmp_path / "a")
    with pytest.raises(UsageError, match="is there twice"):
        baselines.check_apart([one, other, f"{one}/"], tmp_path / "c")


def test_a_damaged_baseline_is_refused(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    run(config(tiny_model, prompts_file(write, 3)), tmp_path / "a")
    found = baselines.read(str(tmp_path / "a"), "r", IDENTITY)
    part = tmp_path / "a" / "evaluations" / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(DataError, match="do not match the digest"):
        found.answers()


def test_settings_that_say_whose_answers_do_not_differ(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    path = prompts_file(write, 3)
    run(config(tiny_model, path), tmp_path / "a")
    baseline = baselines.read(str(tmp_path / "a"), "r", IDENTITY)
    changes = {"seed": 3, "round": 2, "num_samples": 5, "pass_reward": 0.5, "limit": 2, "max_tokens": 70, "top_k": 9}
    run(config(tiny_model, path, **changes), tmp_path / "b")
    assert baselines.differences(baseline, tmp_path / "b") == {"max_tokens": [80, 70], "top_k": [0, 9]}
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"config": {}}))
    assert "max_tokens" in baselines.differences(baseline, tmp_path / "empty")
