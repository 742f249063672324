"""The tables of systems: all of them, pairs of them, and what they were worth after each phase of their training.

table = systems_table(systems, ours)        # html, markdown and terminal of conrec.report.table
steps = difference_table(("step", "against"), rows)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from conrec.evaluation.document import CATCH, COLUMNS, Figures, System
from conrec.evaluation.metrics import MEASURES
from conrec.report.table import Cell, Column, Medium, Row, Table

_WITH_INTERVAL = ("FHR", "FPH", "Lift", CATCH)
"""Measures that have their interval in Markdown too, where it stands beside them."""
_COSTS = ("training", "parameters", "users/s")
_PAGES: tuple[Medium, ...] = ("html", "markdown")


def systems_table(systems: Mapping[str, System], ours: str) -> Table:
    """Every system with its measures and costs; in a terminal the measures of ranked lists alone."""
    columns = [Column("#", media=("html",)), Column("system", "name"), Column("group", "name", media=("markdown",))]
    columns += [_measure(measure) for measure in COLUMNS]
    columns += [Column(cost, media=_PAGES) for cost in _COSTS]
    rows = []
    for place, (name, system) in enumerate(systems.items(), 1):
        figures = (system.figures.get(measure, {}) for measure in COLUMNS)
        cells: list[Cell] = [str(place), name, system.group, *figures, *_costs(system)]
        rows.append(Row(cells, system.group, name == ours, system.note))
    return Table(columns, rows, style="systems")


def _measure(name: str) -> Column:
    return Column(
        name,
        # Not of FPH: a list of random items harms least.
        bold=None if name == "FPH" else "best",
        media=("html", "markdown", "terminal") if name in MEASURES else _PAGES,
        intervals=_PAGES if name in _WITH_INTERVAL else ("html",),
    )


def difference_table(first: Sequence[Column], rows: Sequence[tuple[Sequence[str], Figures]]) -> Table:
    """Paired differences: `first` heads the columns of words, each row is its words and its figures.

    Columns that no row defines are left out. Bold: an interval without 0.
    """
    measures = [measure for measure in COLUMNS if any(measure in figures for _, figures in rows)]
    columns = [*first, *(Column(measure, signed=True, bold="sure") for measure in measures)]
    return Table(columns, [Row([*words, *(figures.get(name, {}) for name in measures)]) for words, figures in rows])


def comparison_table(comparisons: Mapping[str, Mapping[str, Any]], whose: str = "") -> Table:
    """Ours at the harm of every other system; `whose` stands before the measures that are the other's."""
    heads = {"FPH": f"{whose}FPH", "FHR": f"{whose}FHR", "ours": "ours there"}
    paired = ("difference", "ratio", "catch_difference", "catch_ratio")
    columns = [Column("system", "words"), *map(Column, heads.values())]
    columns += [Column(key.replace("_", " "), signed="difference" in key) for key in paired]
    rows = [
        Row([name, *({"value": row.get(key)} for key in heads), *(row.get(key) or {} for key in paired)])
        for name, row in comparisons.items()
    ]
    return Table(columns, rows)


def grid(head: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """Figures in rows and columns, a dash where a row lacks a column."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    return Table(
        [Column(head, "words"), *map(Column, columns)],
        [Row([name, *(row.get(column) or {} for column in columns)]) for name, row in rows.items()],
    )


def phase_table(head: str, courses: Mapping[str, Mapping[str, float]]) -> Table:
    """System -> phase -> value, as a grid."""
    figures = {name: {phase: {"value": value} for phase, value in row.items()} for name, row in courses.items()}
    return grid(head, figures)


def duration(seconds: float | None) -> str:
    """`42 s`, `3 min`, `2.5 h`."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def count(value: int | None) -> str:
    """`940`, `152 k`, `1.2 M`."""
    if value is None:
        return "–"
    if value < 1000:
        return str(value)
    return f"{value / 1e3:.0f} k" if value < 999_500 else f"{value / 1e6:.1f} M"


def _costs(system: System) -> list[str]:
    rate = system.users_per_second
    return [
        duration(system.training_seconds),
        count(system.parameters),
        "–" if rate is None else f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}",
    ]
