"""CSV and JSON lines, gzipped or not, as the tables that Parquet would have given.

Invariant: a column of `types` is text as it stands in the file, or a time with its zone; an empty value of a CSV file
is null, `""` is the empty text, and no other word (NA, null) means null. Other columns are typed by what they hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.json as json_lines

from conrec.errors import DataError
from conrec.storage import arrow_filesystem
from conrec.store_errors import names_store
from conrec.tables import TIMESTAMP

_BLOCK_BYTES = 1 << 26
"""Read at once, and so the longest row."""
_MICROSECONDS = len("2026-01-31T18:00:00.000000Z")
_NO_BYTE = "Empty JSON file"
"""What Arrow raises for a file of no byte; one of empty lines it reads."""
_TIME = r"^\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d(:?\d\d)?)$"


def read_csv(url: str, types: Mapping[str, pa.DataType]) -> pa.Table:
    """A CSV file: commas, double quotes, names in the first line. Raises `DataError` where it is none, or is empty."""
    texts = {name: pa.string() for name, kind in types.items() if _is_text(kind)}
    convert = csv.ConvertOptions(
        column_types=texts, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
    )
    # On one thread, so that a message names the row.
    read = csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES)
    try:
        with _stream(url) as stream:
            table = csv.read_csv(stream, read, csv.ParseOptions(newlines_in_values=True), convert)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{url}: not readable as CSV: {error}; write commas, quotes, UTF-8 and the names first"
        ) from None
    return _with_times(table, types, url)


def read_json_lines(url: str, types: Mapping[str, pa.DataType]) -> pa.Table:
    """A file with a JSON object in each line; of one without a line a table without a column. Raises `DataError` where
    it is none."""
    known = pa.schema([(name, pa.string() if _is_text(kind) else kind) for name, kind in types.items()])
    read = json_lines.ReadOptions(block_size=_BLOCK_BYTES)
    parse = json_lines.ParseOptions(explicit_schema=known, unexpected_field_behavior="infer")
    try:
        with _stream(url) as stream:
            table = json_lines.read_json(stream, read, parse)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        if str(error) == _NO_BYTE:
            return pa.table({})
        raise DataError(
            f"{url}: not readable as JSON lines: {error}; write one object a line, identifiers and times as strings"
        ) from None
    # Names of the schema that the file lacks have become columns of nulls.
    absent = [name for name in known.names if table[name].null_count == len(table)]
    return _with_times(table.drop_columns(absent), types, url)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_timestamp(kind)


@names_store
def _stream(url: str) -> Any:
    files, path = arrow_filesystem(url)
    return files.open_input_stream(path, compression="gzip" if url.lower().endswith(".gz") else None)


def _with_times(table: pa.Table, types: Mapping[str, pa.DataType], source: str) -> pa.Table:
    for place, name in enumerate(table.column_names):
        if name in types and pa.types.is_timestamp(types[name]):
            table = table.set_column(place, name, _times(table.column(place), name, source))
    return table


def _times(column: pa.ChunkedArray, name: str, source: str) -> pa.ChunkedArray:
    """ISO 8601 with a zone as timestamps; digits beyond microseconds are cut off."""
    readable = pc.fill_null(pc.match_substring_regex(column, _TIME), True)
    row = pc.index(readable, False).as_py()
    if row >= 0:
        raise DataError(
            f"{source}: column {name} holds {column[row].as_py()!r} in row {row}, which is no time with a zone; "
            "write ISO 8601, for example 2026-01-31T18:00:00Z"
        )
    if (pc.max(pc.binary_length(column)).as_py() or 0) > _MICROSECONDS:
        column = pc.replace_substring_regex(column, r"(\.\d{6})\d+", r"\1")
    try:
        return column.cast(TIMESTAMP)
    except pa.ArrowInvalid as error:  # the 31st of February
        raise DataError(f"{source}: column {name} holds no time: {error}; write ISO 8601 with a zone") from None
