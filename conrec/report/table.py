"""One table of an evaluation, in the three forms in which people read it.

    table = Table((Column("system", "name"), Column("FHR")), [Row(("random", {"value": 0.2, "low": 0.1, "high": 0.3}))])
    html(table)             # report.html: intervals under the values
    markdown(table)         # table.md: intervals in brackets
    terminal(table)         # a rich table, without intervals

Invariant: a figure reads the same in all three: three decimals where shares lie, a dash where it is undefined, and
never a value without a name for what it measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal, NamedTuple

from rich.table import Table as RichTable

from conrec.report.plots import COLOURS, NAMES

Figure = Mapping[str, float | None]
"""value, and low and high where there is an interval."""
Cell = str | Figure
"""Words, or a figure."""
Medium = Literal["html", "markdown", "terminal"]


class Column(NamedTuple):
    """A column, and how its cells are read.

    `kind`: a name, words that may be long, a word, or a figure. `signed`: figures bear their sign. `bold` in HTML: the
    largest of the column, or a difference whose interval leaves 0 out. `media`: where it is shown; `intervals`: where
    its figures have theirs.
    """

    head: str
    kind: Literal["name", "words", "word", "figure"] = "figure"
    signed: bool = False
    bold: Literal["best", "sure"] | None = None
    media: tuple[Medium, ...] = ("html", "markdown", "terminal")
    intervals: tuple[Medium, ...] = ("html", "markdown")


@dataclass(frozen=True)
class Row:
    """A cell for each column; a row of `group` stands below that group's line; `ours` sets it apart."""

    cells: Sequence[Cell]
    group: str = ""
    ours: bool = False
    note: str = ""
    """What a reader of the row must know: stands below the table, where it widens no column."""


@dataclass(frozen=True)
class Table:
    """`title` names it, `key` its caption, `style` its class in HTML."""

    columns: Sequence[Column]
    rows: Sequence[Row]
    title: str = ""
    key: str = ""
    style: str = ""

    def notes(self) -> list[tuple[str, str]]:
        """Name and note of the rows that have one."""
        name = next(place for place, column in enumerate(self.columns) if column.kind == "name")
        return [(str(row.cells[name]), row.note) for row in self.rows if row.note]


def html(table: Table) -> str:
    """In HTML; it scrolls sideways where the screen is narrow."""
    places = _shown(table, "html")
    columns = [table.columns[place] for place in places]
    best = {place: _best(table, place) for place in places if table.columns[place].bold == "best"}
    lines = ["<tr>" + "".join(f"<th{_class(column)}>{escape(column.head)}" for column in columns)]
    group = ""
    for row in table.rows:
        if row.group != group:
            group = row.group
            line = f"<tr class=group><td><td>{swatch(group)}{NAMES[group]}<td colspan={len(columns) - 2}>"
            lines.append(line)
        cells = "".join(_html(table.columns[place], row.cells[place], best.get(place)) for place in places)
        lines.append(f"<tr{' class=ours' * row.ours}>{cells}")
    notes = "".join(f"<li>{escape(name)}: {escape(note)}" for name, note in _notes(table))
    style = f" class={table.style}" if table.style else ""
    below = f"<ul class=notes>{notes}</ul>" if notes else ""
    return f"<div class=wide><table{style}>{'</tr>'.join(lines)}</tr></table></div>{below}"


def markdown(table: Table) -> str:
    """In Markdown, without its title."""
    places = _shown(table, "markdown")
    columns = [table.columns[place] for place in places]
    marks = ["---" if column.kind in ("name", "words") else "---:" for column in columns]
    lines = [[column.head for column in columns], marks]
    lines += [[_markdown(table.columns[place], row.cells[place]) for place in places] for row in table.rows]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    text = "".join(f"| {' | '.join(line)} |\n" for line in escaped)
    notes = "".join(f"- {name}: {note}\n" for name, note in _notes(table))
    return f"{text}\n{notes}" if notes else text


def terminal(table: Table) -> RichTable:
    """For a terminal of 80 columns; ours in bold."""
    places = _shown(table, "terminal")
    found = RichTable(box=None, pad_edge=False, header_style="dim")
    for column in (table.columns[place] for place in places):
        figures = column.kind == "figure"
        found.add_column(column.head, justify="right" if figures else "left", no_wrap=figures)
    for row in table.rows:
        cells = [_plain(row.cells[place], table.columns[place].signed) for place in places]
        found.add_row(*cells, style="bold" if row.ours else "")
    return found


def number(value: float | None, signed: bool = False) -> str:
    """Three decimals below one, where shares lie, fewer above; a dash for what is undefined."""
    if value is None:
        return "–"
    plus = "+" if signed and value > 0 else ""
    if value == 0:
        return "0"
    if abs(value) < 1:
        return plus + f"{value:.3f}".replace("0.", ".", 1)
    return plus + (f"{value:,.2f}" if abs(value) < 100 else f"{value:,.0f}")


def bracketed(figure: Figure | None, signed: bool = False) -> str:
    """A figure with its interval in brackets."""
    value, low, high = ((figure or {}).get(end) for end in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return number(value, signed)
    return f"{number(value, signed)} [{number(low, signed)}, {number(high, signed)}]"


def swatch(group: str) -> str:
    """The dot of the group's colour, as in the pictures."""
    return f'<span class=dot style="background:{COLOURS[group]}"></span>'


def _shown(table: Table, medium: Medium) -> list[int]:
    return [place for place, column in enumerate(table.columns) if medium in column.media]


def _notes(table: Table) -> list[tuple[str, str]]:
    return table.notes() if any(row.note for row in table.rows) else []


def _best(table: Table, place: int) -> float | None:
    """The largest value of a column."""
    cells = (row.cells[place] for row in table.rows)
    values = (cell.get("value") for cell in cells if not isinstance(cell, str))
    return max((value for value in values if value is not None), default=None)


def _class(column: Column) -> str:
    return f" class={column.kind}" if column.kind in ("words", "word") else ""


def _html(column: Column, cell: Cell, best: float | None) -> str:
    if isinstance(cell, str):
        return f"<td{_class(column)}>{escape(cell)}"
    value, low, high = (cell.get(end) for end in ("value", "low", "high"))
    text, whole = number(value, column.signed), low is not None and high is not None
    sure = column.bold == "sure" and whole and (low > 0 or high < 0)  # type: ignore[operator]
    if value is None:
        return f"<td>{text}"
    if sure or (column.bold == "best" and value == best):
        text = f"<b>{text}</b>"
    if not whole or "html" not in column.intervals:
        return f"<td>{text}"
    return f"<td>{text}<small>{number(low, column.signed)} to {number(high, column.signed)}</small>"


def _markdown(column: Column, cell: Cell) -> str:
    if isinstance(cell, str) or "markdown" not in column.intervals:
        return _plain(cell, column.signed)
    return bracketed(cell, column.signed)


def _plain(cell: Cell, signed: bool) -> str:
    return cell if isinstance(cell, str) else number(cell.get("value"), signed)
