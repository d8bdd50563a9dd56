"""One Parquet file of a run: its columns and values are checked before it is written, its schema when it is read.

The only writer of Parquet. Page checksums are written, and verified while reading.
"""

import dataclasses
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prefpipe import reading
from prefpipe.errors import DataError
from prefpipe.runs import fsio
from prefpipe.runs.storage import utf8
from prefpipe.schemas import DATASET_KEY, MESSAGE, PLAIN_MESSAGE, VERSION_KEY, arrow_schema

# Columns that a file holds only where a row has a value: files of rows without one keep their bytes.
_ONLY_WITH_VALUES = {"loss_mask", "chosen_loss_mask", "rejected_loss_mask", "loss_masks"}
_OTHER_VERSION = (
    "make that run again: its config.json is the recipe of its command; "
    "or use the prefpipe that made it, named under `versions` in its manifest.json"
)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The bytes of a file of so many rows: a worker makes them, and the process that holds the run writes them."""

    file: bytes
    num_rows: int


Content = pa.Table | Encoded  # of a file


def encoded(row_type: type, table: pa.Table, name: str) -> Encoded:
    """Rows of a type as the file that a `writer` writes; raises as it does, by the name of the dataset."""
    sink = pa.BufferOutputStream()
    _write(_checked(row_type, table, Path(name)), sink)
    return Encoded(sink.getvalue().to_pybytes(), table.num_rows)


def writer(path: Path, row_type: type, table: Content) -> fsio.Writer:
    """A function that writes rows of a type into a file. Raises DataError, with the name `path`, for other columns,
    values that do not fit, nulls and NaN."""
    if isinstance(table, Encoded):
        return lambda temporary: temporary.write_bytes(table.file)
    checked = _checked(row_type, table, path)

    def write(temporary: Path) -> None:
        with utf8(temporary) as name:
            _write(checked, name)

    return write


def _write(checked: pa.Table, sink: Path | pa.NativeFile) -> None:
    pq.write_table(checked, sink, write_page_checksum=True, compression="zstd")


def read_table(path: Path, row_type: type, columns: list[str] | None = None) -> pa.Table:
    """The rows of a file, or some columns of them. Raises DataError as `check_schema` does, and for a damaged file."""
    with _damage(path), utf8(path) as name, pq.ParquetFile(name, page_checksum_verification=True) as file:
        schema = file.schema_arrow
        _check_schema(schema, row_type, path)
        wanted = None if columns is None else [column for column in columns if column in schema.names]
        table = file.read(wanted)
    return _as_written_now(table, row_type, columns)


def among(table: pa.Table, keys: Sequence[str], column: str = "completion_id") -> pa.Table:
    """The rows of a table that have one of `keys` in a column of ids."""
    return table.filter(pc.call_function("is_in", [table[column]], pc.SetLookupOptions(pa.array(keys, pa.string()))))


def check_schema(path: Path, row_type: type) -> None:
    """Raise DataError when a file holds another dataset, another version of it, or other columns than `row_type`."""
    with _damage(path), utf8(path) as name:
        schema = pq.read_schema(name)
    _check_schema(schema, row_type, path)


def read_parquet(path: Path) -> pa.Table:
    """A Parquet file of any schema, page checksums verified where it has them."""
    with _damage(path), utf8(path) as name, pq.ParquetFile(name, page_checksum_verification=True) as file:
        return file.read()  # pq.read_table would import pyarrow.dataset, and with it pandas: half a second


@contextmanager
def _damage(path: Path) -> Generator[None]:
    with reading.opened(path):  # refuses what is no file
        pass
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}", "the file is damaged or is not Parquet") from error


def _check_schema(schema: pa.Schema, row_type: type, path: Path) -> None:
    expected = arrow_schema(row_type)
    dataset, version = (_written(schema, key) for key in (DATASET_KEY, VERSION_KEY))
    if dataset != row_type.__name__:
        raise DataError(f"{path} holds '{dataset}', not '{row_type.__name__}'", "check which directory you passed")
    if version != _written(expected, VERSION_KEY):
        raise DataError(
            f"{path} holds '{dataset}' in schema version {version}; this prefpipe reads version "
            f"{_written(expected, VERSION_KEY)}",
            _OTHER_VERSION,
        )
    lacking = set(expected.names) - set(schema.names)
    wrong = [f"{f.name} ({f.type})" for f in expected if not _is_readable(schema, f, row_type)]
    if wrong or len(schema) != len(expected) - len(lacking):
        raise DataError(
            f"{path}: columns of {dataset} are missing or of another type: "
            f"{', '.join(wrong) or 'there are more than it has'}",
            _OTHER_VERSION,
        )


def _is_readable(schema: pa.Schema, field: pa.Field, row_type: type) -> bool:
    """Whether a file holds a column as it is written today or as it was once: messages without `extra`, and no column
    that came later or that is left out where it is null."""
    if field.name not in schema.names:
        return field.name in _optional(row_type)
    return schema.field(field.name) in (field, field.with_type(_earlier(field.type)))


def _optional(row_type: type) -> set[str]:
    return {f.name for f in dataclasses.fields(row_type) if f.default is None}  # type: ignore[arg-type]  # a dataclass


def _earlier(data_type: pa.DataType) -> pa.DataType:
    if pa.types.is_list(data_type):
        return pa.list_(pa.field("element", _earlier(data_type.value_type), nullable=False))
    return PLAIN_MESSAGE if data_type == MESSAGE else data_type


def _as_written_now(table: pa.Table, row_type: type, columns: list[str] | None) -> pa.Table:
    """The table with these columns, or all, as they are today: those that it lacks are null."""
    expected = arrow_schema(row_type)
    if columns is not None:
        expected = pa.schema([expected.field(name) for name in columns], metadata=expected.metadata)
    if table.schema.equals(expected):
        return table
    columns = [
        table[f.name].cast(f.type) if f.name in table.column_names else pa.nulls(table.num_rows, f.type)
        for f in expected
    ]
    return pa.table(columns, schema=expected)


def _written(schema: pa.Schema, key: str) -> str:
    return (schema.metadata or {}).get(key.encode(), b"?").decode(errors="replace")


def _checked(row_type: type, table: pa.Table, path: Path) -> pa.Table:
    """Exact columns, exact types, no null and no NaN where the schema has none: Arrow itself checks none of it."""
    schema = arrow_schema(row_type)
    if set(table.column_names) != set(schema.names):
        differing = sorted(set(table.column_names) ^ set(schema.names))
        raise DataError(f"{path}: columns {differing} are not those of {row_type.__name__}", "this is a bug: report it")
    for field in schema:
        column = table.column(field.name)
        if not field.nullable and column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise DataError(f"{path}: column '{field.name}' has no value in row {row}", "fix that row of the input")
        if pa.types.is_list(field.type) and pa.types.is_list(column.type) and _flat(column).null_count:
            raise DataError(f"{path}: column '{field.name}' has a list with a missing value", "fix the input")
    table = pa.table([_cast(table.column(field.name), field, path) for field in schema], schema=schema)
    for field in schema:
        column = table.column(field.name)
        values = _flat(column) if pa.types.is_list(field.type) else column
        if pa.types.is_floating(values.type) and pc.call_function("any", [values.is_nan()]).as_py():
            raise DataError(f"{path}: column '{field.name}' holds NaN", "find the model or reward that returned it")
    empty = [name for name in schema.names if name in _ONLY_WITH_VALUES and table[name].null_count == table.num_rows]
    return table.drop_columns(empty)


def _cast(column: pa.ChunkedArray, field: pa.Field, path: Path) -> pa.ChunkedArray:
    try:
        if isinstance(field.type, pa.BaseExtensionType) and column.type == field.type:
            return column
        return column.cast(field.type)
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{path}: column '{field.name}': {error}", f"it must be {field.type}: fix the input") from error


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks().flatten()
