"""Which of several cached values a completion gets, and what rows of two scorers carry. Files: test_stage.py."""

import polars as pl
import pytest

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.errors import DataError, IdentityError
from prefpipe.schemas import Pair, RankedGroup, arrow_schema
from prefpipe.stages.build_pairs import output_rows
from prefpipe.stages.build_pairs.output_rows import Contents

COMPLETION = {"completion_id": ["c", "d"], "text": ["good", "bad"], "prompt_token_ids": [[1], [1]]}
COMPLETION |= {"token_ids": [[5, 2], [6, 2]], "ids_digest": ["dc", "dd"], "policy": ["w", "w"]}
MESSAGE = pl.Struct({"role": pl.String, "content": pl.String, "extra": pl.String})
COMPLETIONS = pl.LazyFrame(COMPLETION).with_columns(
    messages=pl.lit(None, pl.List(MESSAGE)),
    thinking=pl.lit(None, pl.String),
    loss_mask=pl.lit(None, pl.List(pl.Boolean)),
)
REFERENCE = {
    "completion_id": ["c", "c", "d"],
    "reference": ["w"] * 3,
    "scorer": ["b", "a", "a"],
    "digest": ["dc", "dc", "dd"],
}
REFERENCE |= {"ref_token_logps": [[-1.0, -1.0], [-2.0, -2.0], [-3.0, -3.0]], "ref_logps": [-2.0, -4.0, -6.0]}
PROMPTS = pl.LazyFrame(
    {"prompt_id": ["p"], "template_inputs": [None], "prompt": [[{"role": "user", "content": "hi", "extra": None}]]}
)


def contents(references: pl.LazyFrame) -> Contents:
    empty = references.clear()
    return Contents(COMPLETIONS, references, empty, PROMPTS)


def of_both(references: pl.LazyFrame) -> pl.DataFrame:
    key = {
        "prompt_id": ["p"], "chosen_completion_id": ["c"], "rejected_completion_id": ["d"], "chosen_reward": [1.0],
        "rejected_reward": [0.0], "reward_gap": [1.0], "weight": [1.0], "chosen_finish_reason": ["stop"],
        "rejected_finish_reason": ["stop"],
    }  # fmt: skip
    made = contents(references)
    with_content = output_rows.sides(pl.DataFrame(key), made.rows())
    return output_rows.pair_rows(with_content, made.of_prompts(), BuildPairsConfig())


def test_of_two_scorers_the_first_by_name_wins_in_any_order() -> None:
    for order in ([0, 1, 2], [2, 1, 0]):
        shuffled = pl.DataFrame(REFERENCE)[order].lazy()
        (row,) = of_both(shuffled).to_dicts()
        assert (row["ref_chosen_logps"], row["ref_rejected_logps"], row["scorer"]) == (-4.0, -6.0, "a")
        assert row["ref_chosen_token_logps"] == [-2.0, -2.0]


def test_sides_of_two_scorers_have_no_reference() -> None:
    other = pl.DataFrame({**REFERENCE, "scorer": ["b", "b", "a"]}).lazy()
    (row,) = of_both(other).to_dicts()
    assert {row["ref_chosen_logps"], row["ref_rejected_logps"], row["reference"], row["scorer"]} == {None}


def test_the_columns_are_those_of_the_dataset() -> None:
    table = output_rows.to_table(of_both(pl.LazyFrame(REFERENCE)), Pair)
    assert table.column_names == arrow_schema(Pair).names


def test_other_ids_are_refused() -> None:
    stale = pl.LazyFrame({**REFERENCE, "digest": ["dc", "dc", "old"]})
    with pytest.raises(IdentityError, match=r"log-probs of 1 completions .*first: completion d"):
        contents(stale).rows()


def test_the_text_of_several_turns_is_that_of_all_of_them() -> None:
    """Two traces that end with the same words are no identical texts; one turn is compared without its reasoning."""
    frame = COMPLETIONS.with_columns(
        thinking=pl.Series(["before ", "<think></think>"]), loss_mask=pl.Series([[False, True], None])
    )
    made = Contents(frame, pl.LazyFrame(REFERENCE), pl.LazyFrame(REFERENCE).clear(), PROMPTS)
    found = made.rows().sort("completion_id")
    assert found["text"].to_list() == ["before good", "bad"]
    assert found["thinking"].to_list() == [None, "<think></think>"]


def test_a_group_has_masks_where_one_of_its_completions_has() -> None:
    ranked = pl.DataFrame(
        {"prompt_id": ["p", "p"], "completion_id": ["c", "d"], "reward": [1.0, 0.0], "finish_reason": ["stop", "stop"]}
    )
    for mask, expected in (([False, True], [[False, True], [True, True]]), (None, None)):
        frame = COMPLETIONS.with_columns(loss_mask=pl.Series([mask, None], dtype=pl.List(pl.Boolean)))
        made = Contents(frame, pl.LazyFrame(REFERENCE), pl.LazyFrame(REFERENCE).clear(), PROMPTS)
        rows = output_rows.group_rows(ranked, made.rows(), made.of_prompts())
        assert output_rows.to_table(rows, RankedGroup)["loss_masks"].to_pylist() == [expected]


def test_a_group_of_two_tokenizers_is_refused() -> None:
    other = COMPLETIONS.with_columns(prompt_token_ids=pl.Series([[1], [9]]))
    made = Contents(other, pl.LazyFrame(REFERENCE), pl.LazyFrame(REFERENCE).clear(), PROMPTS)
    ranked = pl.DataFrame(
        {"prompt_id": ["p", "p"], "completion_id": ["c", "d"], "reward": [1.0, 0.0], "finish_reason": ["stop", "stop"]}
    )
    with pytest.raises(DataError, match="other token ids"):
        output_rows.group_rows(ranked, made.rows(), made.of_prompts())
    same = contents(pl.LazyFrame(REFERENCE))
    table = output_rows.to_table(output_rows.group_rows(ranked, same.rows(), same.of_prompts()), RankedGroup)
    assert table.to_pylist()[0]["ref_logps"] == [-4.0, -6.0]
