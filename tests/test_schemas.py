"""Row types and Arrow tables say the same: types, nullability, values."""

import dataclasses
import types
import typing
from typing import Annotated, Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe import schemas
from prefpipe.schemas import (
    Completion,
    Dropped,
    Evaluation,
    KlBank,
    Label,
    Margin,
    Measure,
    Message,
    Pair,
    Prompt,
    RankedGroup,
    RefLogps,
    Reward,
)

ROW_TYPES = (
    Prompt,
    Completion,
    RefLogps,
    Reward,
    Pair,
    Label,
    KlBank,
    RankedGroup,
    Evaluation,
    Measure,
    Margin,
    Dropped,
)
REFERENCE = {"ref_logps", "ref_token_logps", "reference", "scorer"}
NULLABLE = {
    Prompt: {"answer", "template_inputs"},
    Completion: {"messages", "thinking", "thinking_tokens", "loss_mask"},
    RefLogps: set[str](),
    Reward: {"reward", "detail"},
    Pair: {
        *("chosen_reward", "rejected_reward", "reward_gap", "preference_prob", "reference", "scorer"),
        *(
            "template_inputs",
            "ref_chosen_logps",
            "ref_rejected_logps",
            "ref_chosen_token_logps",
            "ref_rejected_token_logps",
            "chosen_loss_mask",
            "rejected_loss_mask",
        ),
    },
    Label: {"reward", "template_inputs", "loss_mask", *REFERENCE},
    KlBank: {"loss_mask", *REFERENCE},
    RankedGroup: {"template_inputs", "loss_masks", *REFERENCE},
    Evaluation: {"reward", "detail", "thinking", "token_logps"},
    Measure: {"against", "decoding", "low", "high"},
    Margin: set[str](),
    Dropped: set[str](),
}
TEXT = st.text(st.characters(codec="utf-8"), max_size=10)
SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    str: TEXT,
    int: st.integers(min_value=-(2**63), max_value=2**63 - 1),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    Message: st.fixed_dictionaries({"role": TEXT, "content": TEXT}),
    schemas.Int32: st.integers(min_value=-(2**31), max_value=2**31 - 1),
    schemas.Float32: st.floats(allow_nan=False, width=32),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    if hint in SCALARS:
        return SCALARS[hint]
    if typing.get_origin(hint) is list:
        return st.lists(values(typing.get_args(hint)[0]), max_size=4)
    assert typing.get_origin(hint) in (types.UnionType, typing.Union)
    return st.none() | values(next(a for a in typing.get_args(hint) if a is not types.NoneType))


def rows(row_type: type) -> st.SearchStrategy[list[Any]]:
    hints = typing.get_type_hints(row_type, include_extras=True)
    return st.lists(st.builds(row_type, **{name: values(hint) for name, hint in hints.items()}), max_size=3)


def test_every_row_type_of_the_module_is_tested() -> None:
    found = {v for v in vars(schemas).values() if dataclasses.is_dataclass(v)}
    assert found == set(ROW_TYPES)


@pytest.mark.parametrize("row_type", ROW_TYPES)
def test_nullability(row_type: type) -> None:
    schema = schemas.arrow_schema(row_type)
    assert {f.name for f in schema if f.nullable} == NULLABLE[row_type]
    assert schema.names == [f.name for f in dataclasses.fields(row_type)]


@pytest.mark.parametrize("row_type", ROW_TYPES)
def test_elements_of_lists_and_fields_of_messages_are_never_null(row_type: type) -> None:
    for field in schemas.arrow_schema(row_type):
        if pa.types.is_list(field.type):
            assert not field.type.value_field.nullable
            if pa.types.is_struct(field.type.value_type):
                assert [(f.name, f.nullable) for f in field.type.value_type] == [
                    ("role", False),
                    ("content", False),
                    ("extra", True),
                ]


@pytest.mark.parametrize("row_type", ROW_TYPES)
def test_the_schema_names_its_dataset_and_version(row_type: type) -> None:
    expected = {b"prefpipe.dataset": row_type.__name__.encode(), b"prefpipe.version": str(schemas.VERSION).encode()}
    assert schemas.arrow_schema(row_type).metadata == expected


def test_number_types() -> None:
    schema = schemas.arrow_schema(RefLogps)
    assert schema.field("token_logps").type.value_type == pa.float32()
    assert schema.field("ref_logps").type == pa.float32()
    assert schema.field("num_tokens").type == pa.int32()
    assert schemas.arrow_schema(Completion).field("token_ids").type.value_type == pa.int32()
    assert schemas.arrow_schema(Reward).field("reward").type == pa.float64()


@pytest.mark.parametrize("row_type", ROW_TYPES)
def test_rows_survive_the_table(row_type: type) -> None:
    @settings(deadline=None, max_examples=25)
    @given(given_rows=rows(row_type))
    def check(given_rows: list[Any]) -> None:
        table = schemas.to_table(row_type, given_rows)
        assert table.schema.equals(schemas.arrow_schema(row_type), check_metadata=True)
        assert schemas.from_table(row_type, table) == given_rows

    check()


def test_a_number_that_does_not_fit_is_refused() -> None:
    row = RefLogps("c", "r", "s", "d", [], 0.0, 2**31)
    with pytest.raises(pa.ArrowException):
        schemas.to_table(RefLogps, [row])


def test_annotations_are_the_only_source() -> None:
    @dataclasses.dataclass(frozen=True)
    class Small:
        flag: bool
        share: Annotated[float, pa.float32()] | None

    schema = schemas.arrow_schema(Small)
    assert schema.field("flag").type == pa.bool_()
    assert (schema.field("share").type, schema.field("share").nullable) == (pa.float32(), True)
