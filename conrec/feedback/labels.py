"""Reading what users did and what items are, from any Parquet files, under our own names.

    interactions = read_interactions(settings.interactions)
    items = read_items(settings.items)

Invariant: what these functions return has passed its schema; feedback is positive, negative or neutral; items are
sorted by item_id, so that an item's row is the same for every stage. Every file of a folder is checked on its
own, so that a message names the file to mend.
"""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

from conrec.config import InteractionSettings, ItemSettings
from conrec.errors import DataError
from conrec.feedback.rules import apply_rules
from conrec.storage import filesystem, join, list_files, read_table
from conrec.tables import INTERACTIONS, ITEMS, KINDS, check

__all__ = ["apply_rules", "read_interactions", "read_items"]


def read_interactions(settings: InteractionSettings) -> pa.Table:
    """All interactions, with `feedback` from the rules if there are any; rows ruled `exclude` are dropped.

    The metadata of the schema names the source. Raises `DataError`.
    """

    def label(table: pa.Table, source: str) -> pa.Table:
        raw = table
        table = _renamed(table, settings.columns, source)
        if settings.rules:
            feedback = apply_rules(raw, settings.rules, source)
            if "feedback" in table.column_names:
                table = table.drop_columns("feedback")
            table = table.append_column("feedback", feedback).filter(pc.not_equal(feedback, "exclude"))
        table = check(table, INTERACTIONS, source)
        unknown = pc.invert(pc.is_in(table["feedback"], value_set=pa.array(KINDS)))
        row = pc.index(unknown, True).as_py()
        if row >= 0:
            raise DataError(
                f"{source}: column feedback holds {table['feedback'][row].as_py()!r} in row {row}, which is none of "
                f"{', '.join(KINDS)}; rename it in the file or write interactions.rules that make it one of them"
            )
        return table

    table = _read(settings.path, label)
    return table.replace_schema_metadata({"source": settings.path})


def read_items(settings: ItemSettings) -> pa.Table:
    """All items, sorted by item_id. Raises `DataError`, also for an item_id that occurs twice."""

    def rename(table: pa.Table, source: str) -> pa.Table:
        return check(_renamed(table, settings.columns, source), ITEMS, source)

    table = _read(settings.path, rename)
    table = table.take(pc.sort_indices(table, sort_keys=[("item_id", "ascending")]))
    ids = table["item_id"].combine_chunks()
    twice = pc.equal(ids.slice(1), ids.slice(0, len(ids) - 1))
    row = pc.index(twice, True).as_py()
    if row >= 0:
        raise DataError(
            f"{settings.path}: column item_id holds {ids[row].as_py()!r} more than once ({pc.sum(twice).as_py()} rows "
            "too many in all); keep one row per item"
        )
    return table


def _read(url: str, prepare: Callable[[pa.Table, str], pa.Table]) -> pa.Table:
    """Every file at the URL, prepared on its own, as one table."""
    urls = [url]
    try:
        files, path = filesystem(url)
        if files.isdir(path):
            urls = [join(url, name) for name in list_files(url) if name.endswith(".parquet")] or [url]
    except (ValueError, OSError) as error:
        raise DataError(f"{url}: not a file or folder that can be read: {error}; mend the path") from None
    tables = [prepare(_read_file(file), file) for file in urls]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{url}: the files disagree on a column: {error}; write it in one type everywhere") from None
    if not len(table):
        raise DataError(f"{url}: the table has no rows; check the path, and rules that exclude everything")
    return table


def _read_file(url: str) -> pa.Table:
    try:
        table = read_table(url)
        table.schema.names  # noqa: B018 - names of columns are decoded here
        return table
    # Damaged pages of a file whose footer is whole; a footer whose names are no text.
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{url}: not readable as Parquet: {error}; write the file again") from None


def _renamed(table: pa.Table, columns: dict[str, str], source: str) -> pa.Table:
    """The table under our names; a column that already had our name gives way to the one the settings name."""
    for ours, theirs in columns.items():
        if theirs not in table.column_names:
            raise DataError(
                f"{source}: column {theirs}, named for {ours} in the settings, is missing; the file has "
                f"{', '.join(table.column_names)}"
            )
    replaced = {ours for ours, theirs in columns.items() if ours in table.column_names and ours != theirs}
    names = {theirs: ours for ours, theirs in columns.items()}
    kept = [name for name in table.column_names if name not in replaced or name in names]
    return table.select(kept).rename_columns([names.get(name, name) for name in kept])
