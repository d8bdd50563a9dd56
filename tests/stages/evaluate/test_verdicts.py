"""A judge in both orders between two evaluations: only verdicts that agree count, and its bias is said."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.judge import Judge
from prefpipe.errors import UsageError
from prefpipe.rewards import judge
from prefpipe.rewards.endpoint import Question, Reply
from prefpipe.runs import store
from prefpipe.schemas import Measure, Reward
from tests.conftest import Call, Write
from tests.stages.evaluate.cases import PAIRWISE, config, estimates_hold, prompts_file, rows_of, run, summary

Verdict = Callable[[str, str], str]


def longer(first: str, second: str) -> str:
    return "first" if len(first) > len(second) else "second"


def asks(verdict: Verdict, asked: list[str]) -> Callable[..., Any]:
    """In place of an endpoint: a judge that sees both texts."""

    def ask(_settings: Judge, questions: Sequence[Question]) -> list[Reply]:
        replies: list[Reply] = []
        for question in questions:
            text = question.messages[1]["content"]
            asked.append(text)
            first, second = (text.split(f"[{name} ANSWER")[1].split("]\n", 1)[1] for name in ("FIRST", "SECOND"))
            first, second = first.split("\n[END OF")[0], second.split("\n[END OF")[0]
            said = verdict(first, second)
            reply = Reply(f'{{"reason": "r", "better": "{said}"}}')
            replies.append(Reply(None, "timeout", "too slow") if said == "none" else reply)
        return replies

    return lambda _settings: ask


@pytest.fixture
def two(tiny_model: Path, write: Write, tmp_path: Path) -> EvaluateConfig:
    """A baseline whose greedy answers are cut, and the settings of a run that is compared with it: ours are longer."""
    path = prompts_file(write, 5)
    run(config(tiny_model, path, max_tokens=12), tmp_path / "a")
    return config(tiny_model, path, baseline=(str(tmp_path / "a"),), judge="pairs", reward_settings=PAIRWISE)


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (longer, {"win": 5, "tie": 0, "loss": 0, "inconsistent": 0, "win_rate": 1.0, "p_value": 2 / 32}),
        (lambda a, b: longer(b, a), {"win": 0, "loss": 5, "win_rate": 0.0}),
        (lambda _a, _b: "tie", {"win": 0, "tie": 5, "loss": 0, "p_value": 1.0}),
        (lambda _a, _b: "first", {"judged": 5, "inconsistent": 5, "without_verdict": 0}),
        (lambda _a, _b: "none", {"judged": 5, "inconsistent": 0, "without_verdict": 5}),
        (lambda a, b: "tie" if len(a) > len(b) else "second", {"inconsistent": 5}),
    ],
)
def test_only_verdicts_that_agree_count(
    two: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verdict: Verdict, expected: dict[str, Any]
) -> None:
    monkeypatch.setattr(judge, "asker", asks(verdict, []))
    (comparison,) = run(two, tmp_path / "b")["totals"]["comparisons"]
    found = comparison["judge"]
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert ("win" in found) == ("length_controlled" in found) == (found["inconsistent"] + found["without_verdict"] < 5)
    if verdict("", "") == "first" and "judged" in expected:
        assert found["order_bias"] == {"first": 1.0, "changed": 1.0, "comparisons": 5}


def test_verdicts_are_kept_and_belong_to_their_answers(
    two: EvaluateConfig, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two questions for each pair of greedy answers, asked once: not by the same command, not when a shard is lost in
    another one. A baseline with other answers is another question."""
    asked: list[str] = []
    monkeypatch.setattr(judge, "asker", asks(longer, asked))
    plain = two.model_copy(update={"baseline": (), "judge": ""})
    run(plain, tmp_path / "b")
    first = run(two, tmp_path / "b")
    assert len(asked) == len(set(asked)) == 10
    assert all("[EXPECTED ANSWER" in text for text in asked)
    (folder,) = (tmp_path / "b" / "verdicts").iterdir()
    rows = store.read_dataset(tmp_path / "b", f"verdicts/{folder.name}", Reward).to_pylist()
    assert {(r["reward"], r["status"], r["detail"]) for r in rows} == {(1.0, "ok", "first, second")}
    greedy = {r.completion_id for r in rows_of(tmp_path / "b") if r.decoding == "greedy"}
    assert {r["completion_id"] for r in rows} == greedy
    (folder / "part-00002.parquet").unlink()
    asked.clear()
    assert run(two, tmp_path / "b") == first
    assert len(asked) == 2
    asked.clear()
    run(plain, tmp_path / "b")
    assert run(two, tmp_path / "b") == first
    assert asked == []
    run(config(tiny_model, Path(two.prompts), max_tokens=14), tmp_path / "c")
    run(two.model_copy(update={"baseline": (str(tmp_path / "c"),)}), tmp_path / "b")
    assert len(asked) == 10


def test_sampled_answers_are_judged_too(two: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample k meets sample k. What was said of greedy answers is not asked again. The p value is that of prompts: the
    two samples of a prompt are no two witnesses."""
    asked: list[str] = []
    monkeypatch.setattr(judge, "asker", asks(longer, asked))
    (before,) = run(two, tmp_path / "b")["totals"]["comparisons"]
    asked.clear()
    on_all = two.model_copy(update={"judge_on": "all"})
    (comparison,) = run(on_all, tmp_path / "b")["totals"]["comparisons"]
    assert comparison["judge"] == before["judge"]
    found = comparison["judge_sampled"]
    rows = [
        {(r.prompt_id, r.sample_index): r.text for r in rows_of(tmp_path / name) if r.decoding == "sampled"}
        for name in ("a", "b")
    ]
    differ = [key for key, text in rows[1].items() if rows[0][key] != text]
    assert len(asked) == 2 * len(differ)
    expected = [(len(rows[1][key]) > len(rows[0][key])) - (len(rows[1][key]) < len(rows[0][key])) for key in rows[1]]
    assert (found["judged"], found["win"], found["loss"]) == (10, expected.count(1), expected.count(-1))
    assert found["p_value"] == comparison["judge"]["p_value"] == 2 / 32
    assert estimates_hold(found) == []
    assert f"judge pairs, sampled: {found['win']} won" in summary(tmp_path / "b")
    measured = store.read_dataset(tmp_path / "b", "measures", Measure).to_pylist()
    assert {row["decoding"] for row in measured if row["of"] == "judge pairs"} == {"greedy", "sampled"}
    asked.clear()
    (alone,) = run(two.model_copy(update={"judge_on": "sampled"}), tmp_path / "c")["totals"]["comparisons"]
    assert ("judge" in alone, alone["judge_sampled"]["win"]) == (False, found["win"])


def test_equal_answers_tie_without_a_question(
    tiny_model: Path, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(judge, "asker", asks(longer, asked))
    path = prompts_file(write, 4)
    run(config(tiny_model, path, seed=1), tmp_path / "a")
    settings = config(tiny_model, path, baseline=(str(tmp_path / "a"),), judge="pairs", reward_settings=PAIRWISE)
    (comparison,) = run(settings, tmp_path / "b")["totals"]["comparisons"]
    assert (comparison["judge"]["tie"], asked) == (4, [])
    assert comparison["judge"]["order_bias"]["first"] == 0.5


@pytest.mark.parametrize("table", [{}, {"pairs": {"kind": "judge"}}, {"pairs": {"kind": "length"}}])
def test_a_judge_must_be_one_of_pairs(table: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match='judge = "pairs" is no judge of pairs'):
        EvaluateConfig(judge="pairs", reward_settings=table)


def test_a_judge_on_the_command_line(
    call: Call, tiny_model: Path, other_model: Path, write: Write, tmp_path: Path
) -> None:
    """The judge of the fake engine follows its schema; its arbitrary verdicts are counted and the bias is said."""
    path = prompts_file(write, 8)
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'model = "{tiny_model}"\nprompts = "{path}"\nengine = "fake"\nreward = "short_sentence"\n'
        '[reward_settings.pairs]\nkind = "judge"\nmode = "pairwise"\nengine = "fake"\nmax_tokens = 200\n'
        f'model = "{other_model}"\n'
    )
    assert call("evaluate", recipe, "--max-tokens", "12", "--out", tmp_path / "a").code == 0
    done = call("evaluate", recipe, "--judge", "pairs", "--baseline", tmp_path / "a", "--out", tmp_path / "b")
    assert done.code == 0, done.stderr
    assert "of 8 changed with order, the first better in" in summary(tmp_path / "b")
    assert "question" not in done.stderr
    done = call("evaluate", recipe, "--judge", "pairs", "--out", tmp_path / "c")
    assert (done.code, "has nothing to compare with: give a baseline" in done.stderr) == (0, True), done.stderr


def test_a_judge_without_a_model_is_refused_before_anything_is_sampled(two: EvaluateConfig, tmp_path: Path) -> None:
    tables = {"pairs": {"kind": "judge", "mode": "pairwise", "engine": "vllm"}}
    settings = EvaluateConfig(**{**two.model_dump(), "reward_settings": tables})
    with pytest.raises(UsageError, match="a judge in an engine needs a model"):
        run(settings, tmp_path / "b")
    assert not (tmp_path / "b").exists()
