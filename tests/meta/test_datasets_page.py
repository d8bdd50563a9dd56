"""The tables of docs/datasets.md are those of the code. PREFPIPE_WRITE_DOCS=1 writes them."""

import dataclasses
import os
import re

import pyarrow as pa
import pytest

from prefpipe import schemas
from prefpipe.inputs import formats, prompt_columns
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "datasets.md"
FOLDERS = {
    "Prompt": "prompts/", "Completion": "completions/", "RefLogps": "ref_logps/", "Reward": "rewards/NAME/",
    "Pair": "pairs/", "Label": "labels/", "KlBank": "kl_bank/", "RankedGroup": "groups/", "Evaluation": "evaluations/",
    "Measure": "measures/", "Margin": "margins/", "Dropped": "dropped.parquet",
}  # fmt: skip


def kind(data_type: pa.DataType) -> str:
    if pa.types.is_list(data_type):
        return f"list of {kind(data_type.value_type)}"
    return "message" if pa.types.is_struct(data_type) else str(data_type)


def columns() -> str:
    parts: list[str] = []
    for name, folder in FOLDERS.items():
        row_type = getattr(schemas, name)
        listed = ", ".join(
            f"`{f.name}`{'?' if f.nullable else ''} {kind(f.type)}" for f in schemas.arrow_schema(row_type)
        )
        parts.append(f"**`{folder}`** ({name}): {' '.join((row_type.__doc__ or '').split())}\n\n{listed}\n")
    return "\n".join(parts)


def test_the_columns_are_those_of_the_schemas() -> None:
    text = PAGE.read_text()
    made = re.sub(
        r"(<!-- columns -->\n).*(<!-- end of columns -->)",
        lambda m: f"{m[1]}\n{columns()}\n{m[2]}",
        text,
        flags=re.DOTALL,
    )
    if "PREFPIPE_WRITE_DOCS" in os.environ:
        PAGE.write_text(made)
    assert PAGE.read_text() == made, "run this test with PREFPIPE_WRITE_DOCS=1"


def test_the_page_names_the_schema_version() -> None:
    assert f"The schema version, {schemas.VERSION}, stands" in PAGE.read_text()


def test_every_row_type_is_on_the_page() -> None:
    rows = {
        n
        for n, v in vars(schemas).items()
        if dataclasses.is_dataclass(v) and getattr(v, "__module__", "") == schemas.__name__
    }
    assert rows == set(FOLDERS)


@pytest.mark.parametrize(
    "name", sorted({*formats._LISTS, *formats._RATINGS, *prompt_columns.PROMPTS, *formats._SIDES[0]})
)
def test_every_column_name_that_is_understood_is_on_the_page(name: str) -> None:
    assert f"`{name}`" in PAGE.read_text()
