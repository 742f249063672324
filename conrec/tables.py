"""The Arrow schema of every table that enters, leaves or passes between stages, and the check of it.

Invariant: a table that passed `check` has every required column in exactly the schema's type, without a null
where the schema allows none, text that is UTF-8, identifiers of at most 1024 bytes, and timestamps that lie between
1990 and 2100. Extra columns are kept behind the schema's own. What breaks the schema is refused where it enters, with
file, column, value and remedy.

    table = check(pyarrow.parquet.read_table("items.parquet"), ITEMS, "items.parquet")
"""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conrec.errors import DataError

TIMESTAMP = pa.timestamp("us", tz="UTC")
KINDS = ("negative", "positive", "neutral")
"""Kinds of feedback; the position is the code an event carries."""

IDENTIFIER_BYTES = 1024
"""Longest user_id and item_id: readers compare them byte by byte, and a store may make keys of them."""

_OPTIONAL = {"optional": "true"}
_EARLIEST = datetime(1990, 1, 1, tzinfo=UTC)
_LATEST = datetime(2100, 1, 1, tzinfo=UTC)
_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


def _optional(name: str, kind: pa.DataType) -> pa.Field:
    """A column that may be absent; where it is present it may hold nulls."""
    return pa.field(name, kind, metadata=_OPTIONAL)


INTERACTIONS = pa.schema(
    [
        _required("user_id", pa.string()),
        _required("item_id", pa.string()),
        _required("timestamp", TIMESTAMP),
        _required("feedback", pa.string()),
    ]
)
ITEMS = pa.schema(
    [
        _required("item_id", pa.string()),
        _required("text", pa.string()),
        _optional("category", pa.string()),
        _optional("embedding", pa.list_(pa.float32())),
    ]
)
ANCHORS = pa.schema([_required("user_id", pa.string()), _required("anchor_time", TIMESTAMP)])
HISTORIES = pa.schema(
    [
        *ANCHORS,
        _required("item_id", pa.string()),
        _required("timestamp", TIMESTAMP),
        _required("feedback", pa.string()),
    ]
)
PAIRS = pa.schema([*ANCHORS, _required("item_id", pa.string())])
PREDICTIONS = pa.schema([*PAIRS, _required("score", pa.float64())])
PROMPTS = pa.schema(
    [
        _required("user_id", pa.string()),
        _required("prompt", pa.list_(pa.int32())),
        _required("excluded_leaves", pa.list_(pa.int32())),
        _required("digest", pa.uint64()),
    ]
)
GENERATED = pa.schema(
    [
        _required("user_id", pa.string()),
        _required("leaves", pa.list_(pa.int32())),
        _required("log_probs", pa.list_(pa.float32())),
        _required("verdicts", pa.list_(pa.float32())),
        pa.field("error", pa.string()),
        _required("digest", pa.uint64()),
    ]
)
BLOCKLIST = pa.schema(
    [
        _required("user_id", pa.string()),
        _required("item_id", pa.string()),
        _required("reason", pa.string()),
        _required("similarity", pa.float32()),
        _required("score", pa.float32()),
        pa.field("semantic_id", pa.string()),
        _required("demotes_at", TIMESTAMP),
        _required("expires_at", TIMESTAMP),
    ]
)
RULES = pa.schema(
    [
        _required("user_id", pa.string()),
        _required("semantic_id", pa.string()),
        _required("score", pa.float32()),
        _required("threshold", pa.float32()),
        _required("demotes_at", TIMESTAMP),
        _required("expires_at", TIMESTAMP),
    ]
)


def plain(table: pa.Table) -> pa.Table:
    """The table without types that many functions lack and that files mix: views, dictionaries, extension types."""
    if not table.num_columns:  # of which a new table would forget the number of rows
        return table
    return pa.table([plain_column(column) for column in table.columns], table.column_names)


def plain_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """One column as `plain` has it."""
    if pa.types.is_list_view(column.type) or pa.types.is_large_list_view(column.type):
        column = pa.chunked_array(
            [_list_of_views(chunk) for chunk in column.chunks], pa.large_list(column.type.field(0))
        )
    if pa.types.is_dictionary(column.type):  # in two steps: values that are views cannot be taken
        column = column.cast(pa.dictionary(column.type.index_type, _plain_type(column.type.value_type)))
    kind = _plain_type(column.type)
    return column if column.type == kind else column.cast(kind)


def _list_of_views(views: pa.Array) -> pa.Array:
    """Arrow's own cast forgets the last offset."""
    lengths = pc.fill_null(pc.list_value_length(views), 0)
    offsets = np.concatenate(([0], np.cumsum(lengths.to_numpy(zero_copy_only=False), dtype=np.int64)))
    kind = pa.large_list(views.type.field(0))
    return pa.LargeListArray.from_arrays(offsets, views.flatten(), kind, mask=pc.is_null(views))


def _plain_type(kind: pa.DataType) -> pa.DataType:
    types = pa.types
    if types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _plain_type(kind.storage_type)
    if types.is_string_view(kind):
        return pa.string()
    if types.is_binary_view(kind):
        return pa.binary()
    if types.is_list(kind):
        return pa.list_(_plain_field(kind.value_field))
    if types.is_large_list(kind):
        return pa.large_list(_plain_field(kind.value_field))
    if types.is_fixed_size_list(kind):
        return pa.list_(_plain_field(kind.value_field), kind.list_size)
    if types.is_struct(kind):
        return pa.struct([_plain_field(field) for field in kind])
    if types.is_map(kind):
        return pa.map_(_plain_type(kind.key_type), _plain_type(kind.item_type))
    return kind


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(_plain_type(field.type))


def check(table: pa.Table, schema: pa.Schema, source: str, rows: np.ndarray | None = None) -> pa.Table:
    """The table with the schema's columns first, in its types, then the extra columns.

    Differences that cannot change a value are cast away: large or dictionary strings, another unit or zone of
    a timestamp, large or fixed-size lists, another width of a number that fits. `source` names the file in
    messages, `rows` the row of the file that each row of the table is, where some were left out. Raises `DataError`.
    """
    columns: dict[str, pa.ChunkedArray] = {}
    for field in schema:
        if field.name not in table.column_names:
            if field.metadata and b"optional" in field.metadata:
                continue
            raise DataError(
                f"{source}: column {field.name} is missing; the file has {', '.join(table.column_names) or 'none'}. "
                f'Add it, or name the file\'s column in the settings: columns = {{{field.name} = "..."}}'
            )
        columns[field.name] = _as_type(_one_column(table, field.name, source), field, source, rows)
    for name in table.column_names:
        if name not in columns:
            columns[name] = _one_column(table, name, source)
    return pa.table(columns)


def _one_column(table: pa.Table, name: str, source: str) -> pa.ChunkedArray:
    if table.column_names.count(name) > 1:
        raise DataError(f"{source}: column {name} occurs more than once; rename or drop all but one")
    return table.column(name)


def _as_type(column: pa.ChunkedArray, field: pa.Field, source: str, rows: np.ndarray | None) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_timestamp(field.type):
        _refuse_lists(column, field, source)
        column = _as_timestamp(column, field.name, source)
    elif column.type != field.type:
        _refuse_lists(column, field, source)
        if not _is_harmless(column.type, field.type):
            raise DataError(
                f"{source}: column {field.name} is {column.type}, not {field.type} (first value "
                f"{_first_value(column)}); write it as {field.type}"
            )
        try:
            column = column.cast(field.type)
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{source}: column {field.name} is {column.type} and does not fit {field.type}: {error}; "
                f"write it as {field.type}"
            ) from None
    if not field.nullable and column.null_count:
        row = pc.index(pc.is_null(column), True).as_py()
        raise DataError(
            f"{source}: column {field.name} is null in {column.null_count} rows, first in row {file_row(rows, row)}; "
            "fill these values or drop the rows"
        )
    if pa.types.is_string(field.type):
        _check_text(column, field.name, source, rows)
    return column


def _check_text(column: pa.ChunkedArray, name: str, source: str, rows: np.ndarray | None) -> None:
    """Text is UTF-8, which Parquet files only promise, and identifiers are short."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        raise DataError(f"{source}: column {name} is no text: {error}; write it as UTF-8") from None
    if name in ("user_id", "item_id"):
        lengths = pc.binary_length(column)
        longest = pc.max(lengths).as_py() or 0
        if longest > IDENTIFIER_BYTES:
            row = file_row(rows, pc.index(lengths, longest).as_py())
            raise DataError(
                f"{source}: column {name} holds {longest} bytes in row {row}, the limit is {IDENTIFIER_BYTES}; write a "
                "shorter identifier, for example its hash"
            )


def file_row(rows: np.ndarray | None, row: int) -> int:
    """The row of the file that a row of a table is; `rows` as `check` takes it."""
    return row if rows is None else int(rows[row])


def _refuse_lists(column: pa.ChunkedArray, field: pa.Field, source: str) -> None:
    types = pa.types
    is_list = types.is_list(column.type) or types.is_large_list(column.type) or types.is_fixed_size_list(column.type)
    if is_list and not types.is_list(field.type):
        raise DataError(
            f"{source}: column {field.name} is {column.type}, many values in a row; write one row an event, or one row "
            "an item in the table of items (`explode` in pandas and Spark, `unnest` in SQL)"
        )


def _is_harmless(given: pa.DataType, wanted: pa.DataType) -> bool:
    types = pa.types
    if types.is_null(given):
        return True
    if types.is_string(wanted):
        return bool(types.is_large_string(given) or types.is_string_view(given))
    if types.is_list(wanted):
        is_list = types.is_list(given) or types.is_large_list(given) or types.is_fixed_size_list(given)
        if not is_list:
            return False
        return given.value_type == wanted.value_type or _is_harmless(given.value_type, wanted.value_type)
    return any(kind(given) and kind(wanted) for kind in (types.is_floating, types.is_integer))


def _as_timestamp(column: pa.ChunkedArray, name: str, source: str) -> pa.ChunkedArray:
    remedy = "write it as timestamp[us, UTC]"
    if not pa.types.is_timestamp(column.type):
        unit = "" if not pa.types.is_integer(column.type) else ", a number without a unit"
        raise DataError(
            f"{source}: column {name} is {column.type}{unit} (first value {_first_value(column)}), "
            f"not timestamp[us, UTC]; {remedy}"
        )
    if column.type.tz is None:
        raise DataError(
            f"{source}: column {name} is {column.type} without a time zone (first value {_first_value(column)}), "
            f"so that its place relative to the cut is unknown; {remedy}"
        )
    # The range is checked in the file's own unit: a wrong unit may not fit the cast to microseconds.
    ticks = column.cast(pa.int64())
    per_second = _PER_SECOND[column.type.unit]
    extremes = pc.min_max(ticks).as_py()
    for value in (extremes["min"], extremes["max"]):
        if value is None:
            continue
        if not _EARLIEST.timestamp() <= value // per_second < _LATEST.timestamp():
            year = 1970 + value / per_second / 31_556_952
            raise DataError(
                f"{source}: column {name} holds {value} {column.type.unit}, which is the year {year:.0f}, outside "
                f"{_EARLIEST.year} to {_LATEST.year}: the unit is wrong; {remedy} from the unit the numbers are in"
            )
    return column.cast(TIMESTAMP, safe=False)


def _first_value(column: pa.ChunkedArray) -> str:
    if not len(column):
        return "none"
    try:
        # Scalars of far times have no datetime; their string form always exists.
        return repr(str(column[0].cast(pa.string()) if pa.types.is_temporal(column.type) else column[0]))
    except (pa.ArrowException, ValueError, OverflowError):  # a type without a string form, text that is no UTF-8
        return "without a readable form"
