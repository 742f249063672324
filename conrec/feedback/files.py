"""Which files belong to an input, and each of them as a table: Parquet, CSV or JSON lines, one file or a folder.

    for file in input_files("s3://bucket/log", types):
        table = read_file(file, types)

`types` gives the columns that are ours the types that they must have, under the names of the file: text stays the text
that is in the file (`007`), times are ISO 8601 with a zone. All other columns are typed by what they hold.

Invariants: no file of a folder is passed over in silence. What begins with `_` or `.` is no data, as in Hadoop; every
other file is read or named in an error. `key=value` folders below the input are columns. Folders that only a table
format understands (Delta, Iceberg, Hudi) are refused: beside the rows of today they hold those that were deleted.
"""

from __future__ import annotations

import contextlib
import posixpath
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from conrec.errors import DataError, StorageError
from conrec.feedback.lines import read_csv, read_json_lines
from conrec.storage import filesystem, join, list_files, parquet_metadata, read_row_groups
from conrec.store_errors import names_store
from conrec.tables import plain

ROWS_AT_ONCE = 1 << 20
Kind = Literal["parquet", "csv", "jsonl"]
_KINDS: dict[str, Kind] = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".ndjson": "jsonl",
    ".ndjson.gz": "jsonl",
}
_READ = ", ".join(f"*{suffix}" for suffix in _KINDS)
_NULL_FOLDER = "__HIVE_DEFAULT_PARTITION__"
_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_ICEBERG = re.compile(r"[^/]+\.metadata\.json(\.gz)?")
_FORMATS = {
    "Delta": """duckdb -c "COPY (FROM delta_scan('{table}')) TO 'rows.parquet'\"""",
    "Iceberg": """duckdb -c "COPY (FROM iceberg_scan('{table}')) TO 'rows.parquet'\"""",
    "Hudi": """spark.read.format("hudi").load("{table}").write.parquet("rows")""",
}
"""Table formats, and a line that writes the rows which they hold today."""


@dataclass(frozen=True)
class InputFile:
    """One file of an input."""

    url: str
    kind: Kind
    folders: Mapping[str, pa.Scalar] = field(default_factory=dict)
    """Column -> value, from the `key=value` folders that the file lies in."""


def input_files(url: str, types: Mapping[str, pa.DataType]) -> list[InputFile]:
    """The files of an input, sorted by name.

    Raises `DataError` for a place with nothing in it, a table format, a file that is no input, files of more than one
    kind, or `key=value` folders that differ.
    """
    try:
        names = _listed(url)
    except StorageError:
        raise
    except (ValueError, OSError) as error:
        raise DataError(f"{url}: not a file or folder that can be read: {error}; mend the path") from None
    _refuse_table_format(url, names or [])
    if names is None:
        return [InputFile(url, _kind(url) or "parquet")]
    names = [name for name in names if not any(map(_is_skipped, name.split("/")))]
    kind = _one_kind(url, names)
    folders = _folder_columns(url, names, types)
    return [InputFile(join(url, name), kind, values) for name, values in zip(names, folders, strict=True)]


def read_file(file: InputFile, types: Mapping[str, pa.DataType]) -> pa.Table:
    """One file with the columns of its folders, without any where it `holds_nothing`. Raises `DataError` where it is
    damaged or of another kind, or where a column occurs twice."""
    read = {"csv": lambda: read_csv(file.url, types), "jsonl": lambda: read_json_lines(file.url, types)}
    read |= {"parquet": lambda: _read_parquet(file.url)}
    with _readable(file):
        table = plain(read[file.kind]())
    return _with_folders(table, file, 0)


def holds_nothing(table: pa.Table) -> bool:
    """Whether a file has neither rows nor names of columns, as JSON lines without a line: it lacks no column."""
    return table.shape == (0, 0)


def _read_parquet(url: str) -> pa.Table:
    metadata = parquet_metadata(url)
    return read_row_groups(url, metadata, range(metadata.num_row_groups))


def file_tables(
    file: InputFile, types: Mapping[str, pa.DataType], wanted: Collection[str] | None
) -> Iterator[tuple[int, pa.Table]]:
    """The same in the order of its rows, each table with its first row; of Parquet about `ROWS_AT_ONCE` rows at a time,
    and the wanted columns alone, None for all. Where one of them is missing all are read: a message then says what
    there is.
    """
    if file.kind != "parquet":
        yield 0, read_file(file, types)
        return
    with _readable(file):
        metadata = parquet_metadata(file.url)
    names, columns = metadata.schema.to_arrow_schema().names, None
    if wanted is not None and set(wanted) <= {*names, *file.folders}:
        # Those of the folders too, to be held against them.
        columns = [name for name in names if name in wanted or name in file.folders]
    for first, groups in _blocks([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]):
        with _readable(file):
            table = plain(read_row_groups(file.url, metadata, groups, columns))
        yield first, _with_folders(table, file, first)


def _blocks(lengths: list[int]) -> Iterator[tuple[int, range]]:
    """Row groups of about ROWS_AT_ONCE rows together, with their first row; of a file without any, none of them."""
    first = begin = rows = 0
    for group, length in enumerate(lengths):
        if rows and rows + length > ROWS_AT_ONCE:
            yield first, range(begin, group)
            first, begin, rows = first + rows, group, 0
        rows += length
    yield first, range(begin, len(lengths))


@contextlib.contextmanager
def _readable(file: InputFile) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    # Damaged pages of a file whose footer is whole; a footer whose names are no text; a cut-off gzip stream.
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file.url}: not readable as {file.kind}: {error}; write the file again") from None


def _with_folders(table: pa.Table, file: InputFile, first: int) -> pa.Table:
    for name in table.column_names:
        if table.column_names.count(name) > 1:
            told = name or "without a name"
            raise DataError(f"{file.url}: column {told} occurs more than once; rename or drop all but one")
    if holds_nothing(table):
        return table
    for name, value in file.folders.items():
        if name in table.column_names:
            _refuse_other_values(table[name], name, value, file.url, first)
        else:
            table = table.append_column(name, pa.repeat(value, len(table)))
    return table


@names_store
def _listed(url: str) -> list[str] | None:
    """The names of all files of a folder, hidden ones too; None for a file."""
    files, path = filesystem(url)
    files.invalidate_cache(path)  # other machines write too
    if files.isdir(path):
        return list_files(url, hidden=True)
    if not files.exists(path):
        raise DataError(f"{url}: no such file or folder")
    return None


def _kind(name: str) -> Kind | None:
    return next((kind for suffix, kind in _KINDS.items() if name.lower().endswith(suffix)), None)


def _is_skipped(part: str) -> bool:
    """Hadoop's rule: what begins so is no data, but for a folder of a column whose name does."""
    return part.startswith(".") or (part.startswith("_") and "=" not in part)


def _one_kind(url: str, names: list[str]) -> Kind:
    others = [name for name in names if _kind(name) is None]
    if others:
        raise DataError(
            f"{url}: {len(others)} files in the folder are no input: {', '.join(others[:3])}"
            f"{', ...' if len(others) > 3 else ''}; read are {_READ}. Convert or rename them, move them away, or begin "
            "their names with _, which is skipped"
        )
    first = {_kind(name): name for name in reversed(names)}
    if not names:
        raise DataError(f"{url}: the folder holds no {_READ.replace(', ', ' or ')}; name the folder that does")
    if len(first) > 1:
        raise DataError(
            f"{url}: the folder holds files of several kinds ({' and '.join(sorted(first.values()))}); keep one kind, "
            "or the same rows may be read twice"
        )
    (kind,) = first
    assert kind is not None
    return kind


def _refuse_table_format(url: str, names: list[str]) -> None:
    """Looks into the folder, and above it: a partition or a file of such a table holds deleted rows as well."""
    for name in names:
        folder, base = posixpath.split(name)
        parts = name.split("/")
        table_format = None
        for marker, kind in (("_delta_log", "Delta"), (".hoodie", "Hudi")):
            if marker in parts[:-1]:
                table_format = kind, "/".join(parts[: parts.index(marker)])
        if posixpath.basename(folder) == "metadata" and _ICEBERG.fullmatch(base):
            table_format = "Iceberg", posixpath.dirname(folder)
        if table_format is not None:
            raise _table_format(table_format[0], join(url, table_format[1]))
    files, path = filesystem(url)
    # Whoever may read the input may not be allowed to look beside it, and then cannot know.
    with contextlib.suppress(OSError):
        for folder in _enclosing(path):
            iceberg = files.ls(f"{folder}/metadata", detail=False) if files.isdir(f"{folder}/metadata") else []
            for kind, is_there in (
                ("Delta", files.isdir(f"{folder}/_delta_log")),
                ("Hudi", files.isdir(f"{folder}/.hoodie")),
                ("Iceberg", any(_ICEBERG.fullmatch(posixpath.basename(name)) for name in iceberg)),
            ):
                if is_there:
                    raise _table_format(kind, str(files.unstrip_protocol(folder)).removeprefix("file://"))


def _enclosing(path: str) -> Iterator[str]:
    """The folders that `path` may be a part of as a table."""
    folder = posixpath.dirname(path.rstrip("/"))
    while folder.strip("/"):
        yield folder
        if "=" not in posixpath.basename(folder) and posixpath.basename(folder) != "data":
            return
        folder = posixpath.dirname(folder)


def _table_format(kind: str, table: str) -> DataError:
    return DataError(
        f"{table}: a {kind} table, whose folder also holds rows that were deleted or replaced; write the rows of today "
        f"and name that file, for example: {_FORMATS[kind].format(table=table)}"
    )


def _folder_columns(url: str, names: list[str], types: Mapping[str, pa.DataType]) -> list[dict[str, pa.Scalar]]:
    """What the `key=value` folders of each file say; whole numbers where all of a key are, else text."""
    texts = [_folder_texts(url, name) for name in names]
    for name, values in zip(names, texts, strict=True):
        if values.keys() != texts[0].keys():
            partitions = [", ".join(keys) or "none" for keys in (texts[0], values)]
            raise DataError(
                f"{url}: {names[0]} lies in folders of {partitions[0]}, {name} in folders of {partitions[1]}; give "
                "every file a folder of each key"
            )
    columns = {}
    for key in texts[0]:
        said_values = [values[key] for values in texts]
        whole = key not in types and all(text is None or _WHOLE_NUMBER.fullmatch(text) for text in said_values)
        column = pa.array(said_values, pa.string())
        columns[key] = column.cast(pa.int64()) if whole else column
    return [{key: column[place] for key, column in columns.items()} for place in range(len(names))]


def _folder_texts(url: str, name: str) -> dict[str, str | None]:
    texts: dict[str, str | None] = {}
    for part in name.split("/")[:-1]:
        key, equals, text = part.partition("=")
        if not key or not equals:
            continue
        try:
            key, text = unquote(key, errors="strict"), unquote(text, errors="strict")
        except UnicodeDecodeError as error:
            raise DataError(f"{url}: the folder {part} of {name} is no UTF-8: {error}; rename it") from None
        if key in texts:
            raise DataError(f"{url}: {name} lies in two folders of {key}; rename one")
        texts[key] = None if text == _NULL_FOLDER else text
    return texts


def _refuse_other_values(column: pa.ChunkedArray, name: str, value: pa.Scalar, source: str, first: int) -> None:
    """A column that the file has too stays as it is there, in its type, if it says the same as the folder."""
    try:
        wanted = value.cast(pa.string()).cast(column.type)
        same = pc.is_null(column) if not wanted.is_valid else pc.fill_null(pc.equal(column, wanted), False)
        row = pc.index(same, False).as_py()
    except pa.ArrowException:  # a value that the column's type does not have
        row = 0 if len(column) else -1
    if row >= 0:
        raise DataError(
            f"{source}: column {name} holds {column[row].as_py()!r} in row {first + row}, and the file lies in the "
            f"folder {name}={value.as_py()}; drop the column, or move the file"
        )
