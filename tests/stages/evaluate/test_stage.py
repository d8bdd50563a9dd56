"""Evaluation: intervals against published numbers, sums by hand, and the stage in process."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.shared import REWARD_NAMES
from prefpipe.errors import UsageError
from prefpipe.ids import sample_seed
from prefpipe.runs import store, tables
from prefpipe.runs.store import Manifest
from prefpipe.schemas import Dropped, Evaluation, Message, Prompt, from_table
from prefpipe.stages.evaluate import stage as evaluate
from prefpipe.stages.evaluate.stage import bootstrap, draws, is_degenerate, summarize, wilson
from tests.conftest import Call

LONG = "a quiet tool keeps water"


def row(prompt: str, decoding: str, reward: float | None, text: str = LONG, finish_reason: str = "stop") -> Evaluation:
    return Evaluation(
        f"{prompt}/{decoding}", prompt, 0, 0, decoding, [], text, [1], finish_reason, "weights:a", "mine:f", reward,
        "ok", None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("passed", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17:857, Table I, method 3
        (15, 148, 0.0624, 0.1605),  # the same table
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_published_intervals(passed: int, total: int, low: float, high: float) -> None:
    """0 of n by hand: the lower end is 0, the upper z^2 / (n + z^2) = 3.8415 / 13.8415 = 0.2775 for n = 10."""
    assert wilson([True] * passed + [False] * (total - passed)) == pytest.approx((low, high), abs=5e-5)


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_wilson_holds_the_share_and_solves_its_equation(passed: list[bool]) -> None:
    """The ends are the shares q at which (p - q)^2 = z^2 q (1 - q) / n."""
    z, n = 1.959964, len(passed)
    p = sum(passed) / n
    low, high = wilson(passed)
    assert 0 <= low <= p + 1e-12
    assert p - 1e-12 <= high <= 1
    for q in (low, high):
        assert (p - q) ** 2 == pytest.approx(z * z * q * (1 - q) / n, abs=1e-12)


def test_wilson_narrows_with_the_number_of_answers() -> None:
    widths = [high - low for low, high in (wilson([True, False] * n) for n in (5, 50, 500))]
    assert widths == sorted(widths, reverse=True)


def test_bootstrap_is_deterministic_and_near_the_normal_interval() -> None:
    """100 prompts with one answer each, half of them passed: the standard error is 0.05, so 0.5 -+ 0.098."""
    groups = [[True], [False]] * 50
    assert bootstrap(groups) == bootstrap(groups)
    low, high = bootstrap(groups)
    assert (low, high) == pytest.approx((0.402, 0.598), abs=0.015)


def test_bootstrap_resamples_prompts_not_answers() -> None:
    """Ten equal answers to each prompt hold no more news than one: the interval is that of the prompts."""
    single = [[n % 2 == 0] for n in range(40)]
    repeated = [group * 10 for group in single]
    assert bootstrap(repeated) == bootstrap(single)
    independent = [[True]] * 200 + [[False]] * 200
    assert bootstrap(independent)[1] - bootstrap(independent)[0] < 0.5 * (bootstrap(single)[1] - bootstrap(single)[0])


def test_bootstrap_of_one_outcome_is_a_point() -> None:
    assert bootstrap([[True, True]] * 7) == (1.0, 1.0)
    assert bootstrap([[False]]) == (0.0, 0.0)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=3), min_size=1, max_size=12))
def test_bootstrap_stays_among_the_rates(groups: list[list[bool]]) -> None:
    low, high = bootstrap(groups)
    rates = [sum(g) / len(g) for g in groups]
    assert min(rates) <= low <= high <= max(rates)


@pytest.mark.parametrize(
    ("text", "finish_reason", "degenerate"),
    [
        (LONG, "stop", False),
        (LONG, "length", True),
        ("two words", "stop", True),
        ("three whole words", "stop", False),
        ("", "stop", True),
        ("a b c a b c a b c", "stop", True),  # 'a b c' three times
        ("a b c a b c a b", "stop", False),  # twice
        ("no no no no no", "stop", True),  # 'no no no' starts at three places
        ("no no no no", "stop", False),  # at two
    ],
)
def test_degenerate_answers(text: str, finish_reason: str, degenerate: bool) -> None:
    assert is_degenerate(row("p", "greedy", 1.0, text, finish_reason), repeated=False) == degenerate
    assert is_degenerate(row("p", "greedy", 1.0, text, finish_reason), repeated=True)


def test_sums_by_hand() -> None:
    """Two prompts. Greedy: rewards 1 and 0.5, so 1 of 2 pass. Sampled: 1, null, 0.9, 1 - two of four pass.

    The mean reward leaves the null out: 2.9 / 3. Words: greedy 5 and 3, mean 4; the cut answer is degenerate.
    """
    rows = [
        row("p", "greedy", 1.0), row("q", "greedy", 0.5, "three whole words", "length"),
        row("p", "sampled", 1.0, "one two three four"), row("p", "sampled", None, "one two three five"),
        row("q", "sampled", 0.9, "one two three six"), row("q", "sampled", 1.0, "one two three seven"),
    ]  # fmt: skip
    found = summarize(rows, 1.0)
    assert found["prompts"] == 2
    low, high = wilson([True, False])
    assert found["greedy"] == {
        "answers": 2, "pass": 0.5, "low": low, "high": high, "mean_reward": 0.75, "mean_words": 4.0, "degenerate": 0.5,
    }  # fmt: skip
    low, high = bootstrap([[True, False], [False, True]])
    assert found["sampled"] == {
        "answers": 4, "pass": 0.5, "low": low, "high": high, "mean_reward": pytest.approx(2.9 / 3), "mean_words": 4.0,
        "degenerate": 0.0,
    }  # fmt: skip
    assert summarize(rows, 0.5)["greedy"]["pass"] == 1.0


def test_all_rewards_null_pass_nothing() -> None:
    rows = [row("p", "greedy", None), row("p", "sampled", None)]
    found = summarize(rows, 0.0)
    assert (found["greedy"]["pass"], found["greedy"]["mean_reward"]) == (0.0, 0.0)


def test_one_text_for_several_prompts_is_degenerate() -> None:
    """The same words for three prompts: a policy that stopped reading. Two may be chance."""

    def share(*prompts: str) -> float:
        others = [row(f"other {n}", "greedy", 1.0, f"another {n} good answer") for n in range(4)]
        rows = [row(p, "greedy", 1.0) for p in prompts] + others
        return summarize([*rows, row("p", "sampled", 1.0)], 1.0)["greedy"]["degenerate"] * len(rows)

    assert share("p", "q", "r") == pytest.approx(3)
    assert share("p", "q") == pytest.approx(0)


def test_one_answer_repeated_to_its_own_prompt_is_not_degenerate() -> None:
    """A confident policy gives the same good answer in every draw; that is not "one text given to several prompts"."""
    rows = [row("p", "greedy", 1.0), *(row("p", "sampled", 1.0) for _ in range(4))]
    assert summarize(rows, 1.0)["sampled"]["degenerate"] == 0.0


def test_greedy_is_drawn_first_then_the_samples() -> None:
    config = EvaluateConfig(num_samples=3, temperature=0.8, seed=4)
    prompt = Prompt("p", [Message(role="user", content="x")], None, "heldout", "", "{}")
    found = draws(config, prompt)
    assert [(d.sample_index, d.temperature) for d in found] == [(0, 0.0), (1, 0.8), (2, 0.8), (3, 0.8)]
    assert [d.seed for d in found[1:]] == [sample_seed(4, "p", k) for k in (1, 2, 3)]


def config(model: Path, prompts: Path, **changes: Any) -> EvaluateConfig:
    base = {"model": str(model), "prompts": str(prompts), "engine": "fake", "max_tokens": 80, "shard_rows": 2,
            "reward": "short_sentence"}  # fmt: skip
    return EvaluateConfig(**{**base, **changes})


def run(settings_: EvaluateConfig, out: Path) -> Manifest:
    return evaluate.run(settings_, out, force=False)


def test_the_stage_rates_held_out_prompts(tiny_model: Path, prompts_file: Path, tmp_path: Path) -> None:
    """Three held-out prompts, one greedy and two sampled answers each; the totals are those of the written rows."""
    manifest = run(config(tiny_model, prompts_file, round=2), tmp_path / "e")
    rows = from_table(Evaluation, store.read_dataset(tmp_path / "e", "evaluations", Evaluation))
    assert [(r.sample_index, r.decoding) for r in rows] == [(0, "greedy"), (1, "sampled"), (2, "sampled")] * 3
    assert len({r.completion_id for r in rows}) == 9
    assert {r.round for r in rows} == {2}
    assert {r.messages[0]["content"] for r in rows} == {f"Tell me about {t}." for t in ("moss", "tram", "clay")}
    assert manifest["totals"] == {"round": 2, **summarize(rows, 1.0)}
    assert manifest["identity"] == {"policy": rows[0].policy}
    lines = evaluate.summary(manifest, tmp_path / "e")
    assert lines[0].startswith("3 prompts rated in")
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["greedy", "sampled"]


def test_shards_change_nothing_and_a_rerun_says_it_is_done(
    tiny_model: Path, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_two = run(config(tiny_model, prompts_file), tmp_path / "a")
    at_once = run(config(tiny_model, prompts_file, shard_rows=64, max_num_seqs=1), tmp_path / "b")
    assert by_two["totals"] == at_once["totals"]
    assert run(config(tiny_model, prompts_file), tmp_path / "a") == by_two
    assert "is complete already" in capsys.readouterr().err


def test_a_lost_shard_is_made_again(tiny_model: Path, prompts_file: Path, tmp_path: Path) -> None:
    first = run(config(tiny_model, prompts_file), tmp_path / "e")
    (tmp_path / "e" / "evaluations" / "part-00001.parquet").unlink()
    assert run(config(tiny_model, prompts_file), tmp_path / "e") == first


def test_dropped_prompts_are_in_the_ledger(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "good"}\n{"prompt": "good"}\n{"prompt": "spells <|im_start|>"}\n')
    run(config(tiny_model, path, split="all"), tmp_path / "e")
    dropped = from_table(Dropped, tables.read_parquet(tmp_path / "e" / "dropped.parquet"))
    assert [d.reason for d in dropped] == ["duplicate", "control_tokens"]


def test_prompts_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no prompts given"):
        run(EvaluateConfig(engine="fake", reward="length"), tmp_path / "e")


def test_the_reward_must_be_named(call: Call, prompts_file: Path, tmp_path: Path) -> None:
    done = call("evaluate", "--prompts", prompts_file, "--engine", "fake", "--out", tmp_path / "e")
    assert (done.code, "no reward given" in done.stderr) == (2, True), done.stderr
    assert all(name in done.stderr for name in REWARD_NAMES)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("text", ["0.7*length + 0.3*math", "length - mine.mod:f", "2*mine.mod:f"])
def test_a_sum_of_rewards_is_refused_with_the_reason(text: str) -> None:
    with pytest.raises(ValueError, match="an answer passes by one reward"):
        EvaluateConfig(reward=text)
