"""The table of systems, and the figures in it, in the three forms in which people read them.

    table.md        markdown_table(systems)
    report.html     html_table(systems, ours)
    the terminal    summary_table(systems, ours)

Invariant: a figure reads the same in all three: three decimals where shares lie, a dash where it is undefined, and
never a value without a name for what it measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich.table import Table

from conrec.evaluation.document import CATCH, COLUMNS, Figures, System
from conrec.evaluation.metrics import MEASURES
from conrec.report.plots import COLOURS, NAMES

_WITH_INTERVAL = ("FHR", "FPH", "Lift", CATCH)
_BOLD = tuple(measure for measure in COLUMNS if measure != "FPH")
"""Measures whose best value is set bold. Not FPH: a list of random items harms least."""
_COSTS = ("training", "parameters", "users/s")


def markdown_table(systems: Mapping[str, System]) -> str:
    """The table in Markdown, 95 % intervals in brackets behind FHR, FPH, Lift and catch, notes below it."""
    header = ["system", "group", *COLUMNS, *_COSTS]
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
    for name, system in systems.items():
        cells = [_interval(system.figures, measure, measure in _WITH_INTERVAL) for measure in COLUMNS]
        lines.append([name.replace("|", "\\|"), system.group, *cells, *_costs(system)])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    notes = "".join(f"- {name}: {system.note}\n" for name, system in systems.items() if system.note)
    return f"{text}\n{notes}" if notes else text


def html_table(systems: Mapping[str, System], ours: str) -> str:
    """The table in HTML: a line for each group, the best of each column bold, intervals under the values."""
    best = {}
    for measure in _BOLD:
        values = [system.figures.get(measure, {}).get("value") for system in systems.values()]
        best[measure] = max((value for value in values if value is not None), default=None)
    lines = ["<tr><th>#<th>system" + "".join(f"<th>{name}" for name in (*COLUMNS, *_COSTS)) + "</tr>"]
    group = None
    for place, (name, system) in enumerate(systems.items(), 1):
        if system.group != group:
            group = system.group
            width = len(COLUMNS) + len(_COSTS)
            lines.append(f"<tr class=group><td><td>{swatch(group)}{NAMES[group]}<td colspan={width}></tr>")
        cells = [figure_cell(system.figures.get(measure, {}), best.get(measure)) for measure in COLUMNS]
        cells += [f"<td>{cost}" for cost in _costs(system)]
        style = " class=ours" if name == ours else ""
        lines.append(f"<tr{style}><td>{place}<td>{escape(name)}{''.join(cells)}</tr>")
    notes = "".join(f"<li>{escape(name)}: {escape(system.note)}" for name, system in systems.items() if system.note)
    below = f"<ul class=notes>{notes}</ul>" if notes else ""
    return f"<div class=wide><table class=systems>{''.join(lines)}</table></div>{below}"


def summary_table(systems: Mapping[str, System], ours: str) -> Table:
    """The measures of ranked lists without intervals for a terminal of 80 columns; ours in bold."""
    table = Table("system", box=None, pad_edge=False, header_style="dim")
    for measure in MEASURES:
        table.add_column(measure, justify="right", no_wrap=True)
    for name, system in systems.items():
        cells = [number(system.figures.get(measure, {}).get("value")) for measure in MEASURES]
        table.add_row(name, *cells, style="bold" if name == ours else "")
    return table


def difference_table(first: Sequence[str], rows: Sequence[tuple[Sequence[str], Figures]]) -> str:
    """Differences in HTML: `first` heads the columns of words, each row is its words and its figures.

    Columns that no row defines are left out. Bold: an interval without 0.
    """
    measures = [measure for measure in COLUMNS if any(measure in figures for _, figures in rows)]
    lines = ["<tr>" + "".join(f"<th class=words>{name}" for name in first) + "".join(f"<th>{m}" for m in measures)]
    for words, figures in rows:
        cells = []
        for measure in measures:
            figure = figures.get(measure, {})
            low, high = figure.get("low"), figure.get("high")
            sure = low is not None and high is not None and (low > 0 or high < 0)
            cells.append(figure_cell(figure, figure.get("value") if sure else None, signed=True))
        lines.append("<tr>" + "".join(f"<td class=words>{escape(word)}" for word in words) + "".join(cells))
    return f"<div class=wide><table>{'</tr>'.join(lines)}</tr></table></div>"


def figure_cell(figure: Mapping[str, float | None], bold: float | None = None, signed: bool = False) -> str:
    """A cell of a table in HTML: the value, bold where it equals `bold`, and its interval below."""
    value, low, high = (figure.get(key) for key in ("value", "low", "high"))
    if value is None:
        return "<td>–"
    text = number(value, signed)
    if value == bold:
        text = f"<b>{text}</b>"
    if low is None or high is None:
        return f"<td>{text}"
    return f"<td>{text}<small>{number(low, signed)} to {number(high, signed)}</small>"


def swatch(group: str) -> str:
    """The dot of the group's colour, as in the pictures."""
    return f'<span class=dot style="background:{COLOURS[group]}"></span>'


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


def duration(seconds: float | None) -> str:
    """`42 s`, `3 min`, `2.5 h`."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _costs(system: System) -> list[str]:
    rate = system.users_per_second
    return [
        duration(system.training_seconds),
        count(system.parameters),
        "–" if rate is None else f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}",
    ]


def count(value: int | None) -> str:
    """`940`, `152 k`, `1.2 M`."""
    if value is None:
        return "–"
    if value < 1000:
        return str(value)
    return f"{value / 1e3:.0f} k" if value < 999_500 else f"{value / 1e6:.1f} M"


def _interval(figures: Figures, measure: str, wanted: bool) -> str:
    figure: Mapping[str, Any] = figures.get(measure, {})
    low, high = figure.get("low"), figure.get("high")
    text = number(figure.get("value"))
    return text if not wanted or low is None or high is None else f"{text} [{number(low)}, {number(high)}]"
