"""The figures of an evaluation in Markdown, for a notebook of experiments: what table.md holds.

Invariant: it says what metrics.json says, in the order of the report, with 95 % intervals in brackets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from conrec.report.published_tables import Table, published_tables, score_tables, threshold_tables
from conrec.report.system_table import COLUMNS, System, markdown_table, number


def markdown_report(document: Mapping[str, Any], systems: Mapping[str, System]) -> str:
    """Tables of the published lists, systems, comparisons, ablation, coverage, responsiveness, forgetting and verdict.

    `document` is metrics.json; a part that it does not have is left out.
    """
    parts = [_titled(table) for table in headline_tables(document)]
    parts.append(markdown_table(systems))
    if document.get("comparisons"):
        parts.append(_comparisons(document["comparisons"]))
    if document.get("ablation"):
        parts.append(_steps(document["ablation"]))
    if document.get("target_coverage"):
        parts.append(_grid("target", document["target_coverage"]["shares"]))
    for event in ("rejected", "liked"):
        if event in document.get("responsiveness", {}):
            parts.append(_answer(event, document["responsiveness"][event]))
    if document.get("forgetting"):
        parts.append(_after_phases("alignment accuracy after", document["forgetting"]))
    if document.get("verdict_auc"):
        parts.append(_after_phases("AUC of the verdict after", document["verdict_auc"]))
    return "\n".join(parts)


def headline_tables(document: Mapping[str, Any]) -> list[Table]:
    """What a metrics.json says of the published lists, of the fitted score and of its thresholds, in this order."""
    makers = (("published", published_tables), ("score", score_tables), ("calibration", threshold_tables))
    return [table for part, make in makers if document.get(part) for table in make(document[part])]


def _titled(table: Table) -> str:
    rows = [[cell if isinstance(cell, str) else _figure(cell, table.differences) for cell in row] for row in table.rows]
    return f"{table.title}:\n\n{_table(table.heads, rows)}"


def _comparisons(comparisons: Mapping[str, Mapping[str, Any]]) -> str:
    heads = ["system", "its FPH", "its FHR", "ours there", "difference", "ratio", "catch difference", "catch ratio"]
    rows = [
        [
            name,
            *(number(row.get(key)) for key in ("FPH", "FHR", "ours")),
            _figure(row.get("difference"), True),
            _figure(row.get("ratio")),
            _figure(row.get("catch_difference"), True),
            _figure(row.get("catch_ratio")),
        ]
        for name, row in comparisons.items()
    ]
    return _table(heads, rows)


def _steps(steps: Sequence[Mapping[str, Any]]) -> str:
    measures = [name for name in COLUMNS if any(name in step["differences"] for step in steps)]
    rows = [
        [step["step"], *(_figure(step["differences"].get(measure), True) for measure in measures)] for step in steps
    ]
    return _table(["step", *measures], rows)


def _answer(event: str, answer: Mapping[str, Any]) -> str:
    own = {name: figure for name, figure in answer.items() if "value" in figure}
    groups = {name: figures for name, figures in answer.items() if "value" not in figures}
    facts = "; ".join(f"{name} {_figure(figure)}" for name, figure in own.items())
    return f"One more item {event}: {facts}.\n\n" + _grid("share of items", groups)


def _grid(first: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    heads = list(dict.fromkeys(name for row in rows.values() for name in row))
    return _table([first, *heads], [[name, *(_figure(row.get(head)) for head in heads)] for name, row in rows.items()])


def _after_phases(head: str, courses: Mapping[str, Mapping[str, float]]) -> str:
    phases = list(dict.fromkeys(phase for row in courses.values() for phase in row))
    rows = [[name, *(number(row.get(phase)) for phase in phases)] for name, row in courses.items()]
    return _table([head, *phases], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def _figure(figure: Mapping[str, float | None] | None, signed: bool = False) -> str:
    value, low, high = ((figure or {}).get(key) for key in ("value", "low", "high"))
    if value is None:
        return "–"
    if low is None or high is None:
        return number(value, signed)
    return f"{number(value, signed)} [{number(low, signed)}, {number(high, signed)}]"
