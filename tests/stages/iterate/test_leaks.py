"""A held-out prompt that is trained on is an error with its id; so are too few prompts for the rounds."""

import json
from pathlib import Path

import pytest

from prefpipe.errors import DataError, UsageError
from prefpipe.inputs.prompts import read_prompts
from prefpipe.stages.iterate import leaks
from tests.stages.iterate.cases import TOPICS, config, write_prompts


def test_prompts_that_are_apart_are_counted(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl")
    assert leaks.check(config(Path("m"), prompts)) == len(TOPICS)
    assert leaks.check(config(Path("m"), prompts, generate={"limit": 4, "part": "2/2"})) == 2


@pytest.mark.parametrize("answer", ["moss", "another answer", None])
def test_a_prompt_on_both_sides_is_named_whatever_its_answer(tmp_path: Path, answer: str | None) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl")
    held_out, _ = read_prompts(prompts, "heldout", 0)
    with prompts.open("a") as file:
        row = {"messages": [{"role": "user", "content": "Name a moss."}], "answer": answer, "split": "train"}
        file.write(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"1 of 2 prompts of \[evaluate\] are trained on too") as caught:
        leaks.check(config(Path("m"), prompts))
    assert next(p.prompt_id for p in held_out if p.answer == "moss") in caught.value.message


def test_many_shared_prompts_are_counted_and_some_named(tmp_path: Path) -> None:
    topics = tuple(f"bird {number}" for number in range(9))
    prompts = write_prompts(tmp_path / "p.jsonl", topics, ())
    with pytest.raises(DataError, match="9 of 9 prompts") as caught:
        leaks.check(config(Path("m"), prompts, evaluate={"split": "train"}))
    assert caught.value.message.count(",") == 5


def test_a_guard_is_held_out_too(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl")
    guard = write_prompts(tmp_path / "guard.jsonl", ("clay",), (TOPICS[0],))
    guarded = {"guard": [f"{guard}:length"], "guard_split": "heldout"}
    with pytest.raises(DataError, match=r"1 of 3 prompts of \[evaluate\] are trained on too"):
        leaks.check(config(Path("m"), prompts, evaluate=guarded))
    assert leaks.check(config(Path("m"), prompts, evaluate={**guarded, "guard_split": "train"})) == len(TOPICS)


@pytest.mark.parametrize(("per_round", "rounds", "fits"), [(3, 2, True), (3, 3, False), (7, 1, False), (1, 6, True)])
def test_rounds_need_as_many_prompts_as_they_take(tmp_path: Path, per_round: int, rounds: int, fits: bool) -> None:
    wanted = config(Path("m"), write_prompts(tmp_path / "p.jsonl"), prompts_per_round=per_round, rounds=rounds)
    if fits:
        assert leaks.check(wanted) == len(TOPICS)
        return
    with pytest.raises(UsageError, match=f"need {per_round * rounds}, \\[generate\\] has {len(TOPICS)}"):
        leaks.check(wanted)


def test_prompts_that_are_dealt_again_are_enough_for_any_number_of_rounds(tmp_path: Path) -> None:
    again = {"prompts_per_round": 3, "repeat_prompts": True, "rounds": 50}
    prompts = write_prompts(tmp_path / "p.jsonl")
    assert leaks.check(config(Path("m"), prompts, **again)) == len(TOPICS)
    with pytest.raises(UsageError, match="1 rounds of 7 prompts need 7"):
        leaks.check(config(Path("m"), prompts, **{**again, "prompts_per_round": 7}))


def test_the_held_out_prompts_of_the_demo_are_held_out() -> None:
    shipped = Path(__file__).resolve().parents[3] / "data" / "prompts.jsonl"
    assert leaks.check(config(Path("m"), shipped)) > 100
