"""Reading what users did and what items are, from any files, under our own names.

    interactions = read_interactions(settings.interactions)
    items = read_items(settings.items)
    for table in interaction_tables(settings.interactions): ...    # the same rows, about a million in memory at a time

Invariant: what these functions return has passed its schema; feedback is positive, negative or neutral; no event is
later than now; items are sorted by item_id, so that an item's row is the same for every stage. Every file of a folder
is checked on its own, so that a message names the file to mend, and the row in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conrec.config import InteractionSettings, ItemSettings
from conrec.errors import DataError
from conrec.feedback.clock import Clock
from conrec.feedback.files import InputFile, file_tables, holds_nothing, input_files, read_file
from conrec.feedback.rules import apply_rules, rule_columns
from conrec.tables import INTERACTIONS, ITEMS, KINDS, check, file_row

__all__ = ["apply_rules", "interaction_tables", "item_tables", "read_interactions", "read_items"]

DROPPED = b"dropped_future_events"
"""In the metadata of the interactions: how many events were left out since they lie ahead of now."""


def read_interactions(settings: InteractionSettings, now: datetime | None = None) -> pa.Table:
    """All interactions, as `interaction_tables` gives them, in one table, with what other columns the files have.

    The metadata of the schema names the source and the number of events that were dropped. Raises `DataError`.
    """
    clock = Clock(settings, now)
    table = _together(settings.path, _tables(settings, clock, whole=True))
    return table.replace_schema_metadata({"source": settings.path, DROPPED: str(clock.dropped)})


def interaction_tables(
    settings: InteractionSettings, now: datetime | None = None, clock: Clock | None = None
) -> Iterator[pa.Table]:
    """The interactions of each file in the order of names, of Parquet about a million rows at a time: our columns
    alone, `feedback` from the rules if there are any, without rows that a rule excludes and, up to `max_future_share`,
    without events later than now.

    Files without a row are given too. Raises `DataError`, after the last file for a share of all of them.
    """
    return _tables(settings, clock or Clock(settings, now), whole=False)


def interaction_files(settings: InteractionSettings) -> list[InputFile]:
    """The files of the interactions, sorted by name. Raises `DataError` as `files.input_files` does."""
    return input_files(settings.path, _interaction_types(settings))


def read_interaction_file(
    file: InputFile, settings: InteractionSettings, clock: Clock, whole: bool = False
) -> Iterator[pa.Table]:
    """One of these files as `interaction_tables` gives it, or `whole` with its other columns; `clock` counts what lies
    ahead of now."""
    types = _interaction_types(settings)
    wanted = None if whole else {*types, *settings.columns.values(), *rule_columns(settings.rules)}
    for first, raw in file_tables(file, types, wanted):
        table = _labelled(raw, settings, file.url, clock, first)
        yield table if whole else table.select(INTERACTIONS.names)


def _tables(settings: InteractionSettings, clock: Clock, whole: bool) -> Iterator[pa.Table]:
    for file in interaction_files(settings):
        yield from read_interaction_file(file, settings, clock, whole)
    clock.check()


def read_items(settings: ItemSettings) -> pa.Table:
    """All items, sorted by item_id. Raises `DataError`, also for an item_id that occurs twice."""
    table = _together(settings.path, item_tables(settings))
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


def item_tables(settings: ItemSettings) -> Iterator[pa.Table]:
    """The items of each file that holds something, in the order of names, our columns first. Raises `DataError`."""
    types = _types(settings.columns, ITEMS)
    for file in input_files(settings.path, types):
        raw = read_file(file, types)
        if holds_nothing(raw):
            continue
        table = check(_renamed(raw, settings.columns, file.url), ITEMS, file.url)
        if "embedding" in table.column_names:
            _refuse_infinite(table, file.url)
        yield table


def _types(columns: dict[str, str], schema: pa.Schema) -> dict[str, pa.DataType]:
    """The file's names of our columns -> the types that they must have."""
    return {columns.get(field.name, field.name): field.type for field in schema}


def _interaction_types(settings: InteractionSettings) -> dict[str, pa.DataType]:
    types = _types(settings.columns, INTERACTIONS)
    if settings.rules:  # the rules read the file's own feedback column, if it has one
        types.pop(settings.columns.get("feedback", "feedback"), None)
    return types


def _labelled(raw: pa.Table, settings: InteractionSettings, source: str, clock: Clock, first: int) -> pa.Table:
    """`first`: the row of the file that the table begins with."""
    if holds_nothing(raw):
        return check(INTERACTIONS.empty_table(), INTERACTIONS, source)
    table = _renamed(raw, settings.columns, source)
    rows = np.arange(first, first + len(table)) if first else None
    if settings.rules:
        feedback = apply_rules(raw, settings.rules, source)
        kept = pc.not_equal(feedback, "exclude")
        rows = first + np.flatnonzero(kept)
        if "feedback" in table.column_names:
            table = table.drop_columns("feedback")
        table = table.append_column("feedback", feedback).filter(kept)
    table = check(table, INTERACTIONS, source, rows)
    unknown = pc.invert(pc.is_in(table["feedback"], value_set=pa.array(KINDS)))
    row = pc.index(unknown, True).as_py()
    if row >= 0:
        raise DataError(
            f"{source}: column feedback holds {table['feedback'][row].as_py()!r} in row {file_row(rows, row)}, which "
            f"is none of {', '.join(KINDS)}; rename it in the file or write interactions.rules that make it one of them"
        )
    return clock.without_future(table, source, rows)


def _refuse_infinite(table: pa.Table, source: str) -> None:
    """A vector with a value that is no number would be far from every item, or near all of them."""
    before = 0
    for chunk in table["embedding"].chunks:
        place = pc.index(pc.fill_null(pc.is_finite(chunk.flatten()), False), False).as_py()
        if place >= 0:
            row = before + pc.list_parent_indices(chunk)[place].as_py()
            raise DataError(
                f"{source}: column embedding holds {chunk.flatten()[place]} in row {row}, item "
                f"{table['item_id'][row].as_py()!r}; write finite numbers, or drop the item"
            )
        before += len(chunk)


def _together(url: str, tables: Iterator[pa.Table]) -> pa.Table:
    checked = list(tables)
    if not any(map(len, checked)):
        raise no_rows(url)
    try:
        table = pa.concat_tables(checked, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{url}: the files disagree on a column: {error}; write it in one type everywhere") from None
    return table


def no_rows(url: str) -> DataError:
    """The error of an input that holds nothing, or of which nothing is left."""
    return DataError(f"{url}: the table has no rows; check the path, and rules that exclude everything")


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
