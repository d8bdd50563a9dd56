"""The stage in process: what it samples, what it resumes, and what it says."""

import json
from pathlib import Path

import pytest

from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.shared import REWARD_NAMES
from prefpipe.errors import UsageError
from prefpipe.runs import tables
from prefpipe.schemas import Dropped, from_table
from prefpipe.stages.evaluate import stage as evaluate
from prefpipe.stages.evaluate.measures import measure, summarize
from tests.conftest import Call
from tests.stages.evaluate.cases import config, rows_of, run


def test_the_stage_rates_held_out_prompts(tiny_model: Path, prompts_file: Path, tmp_path: Path) -> None:
    """Three held-out prompts, one greedy and two sampled answers each; the totals are those of the written rows."""
    manifest = run(config(tiny_model, prompts_file, round=2), tmp_path / "e")
    rows = rows_of(tmp_path / "e")
    assert [(r.sample_index, r.decoding) for r in rows] == [(0, "greedy"), (1, "sampled"), (2, "sampled")] * 3
    assert len({r.completion_id for r in rows}) == 9
    assert {r.round for r in rows} == {2}
    assert {r.messages[0]["content"] for r in rows} == {f"Tell me about {t}." for t in ("moss", "tram", "clay")}
    totals = dict(manifest["totals"])
    assert list(totals.pop("rewards")) == ["short_sentence"]
    assert totals == {"round": 2, **summarize(measure(rows), 1.0)}
    assert manifest["identity"] == {"policy": rows[0].policy}
    lines = evaluate.summary(manifest, tmp_path / "e")
    assert lines[0].startswith("3 prompts rated in")
    assert lines[1].split() == ["greedy", "sampled"]
    assert lines[2].split()[0] == "pass"


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


def test_a_run_of_before_is_complete_as_it_is(
    tiny_model: Path, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither settings nor a manifest of before know of anything beside the answers."""
    manifest = run(config(tiny_model, prompts_file), tmp_path / "e")
    saved = json.loads((tmp_path / "e" / "config.json").read_text())
    assert saved["identity"]["reward"] == "short_sentence"
    assert not {"baseline", "kl_to", "guard", "judge"} & saved["identity"].keys()
    assert "beside" not in manifest["identity"]
    later = EvaluateConfig.model_validate({**saved["config"], "reward": "short_sentence"})
    assert run(later, tmp_path / "e") == manifest
    assert "is complete already" in capsys.readouterr().err
