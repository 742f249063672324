"""The figures of an evaluation in Markdown, for a notebook of experiments: what table.md holds.

Invariant: it says what metrics.json says, in the order of the report, with 95 % intervals in brackets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conrec.evaluation.document import System
from conrec.report.published_tables import headline_tables
from conrec.report.system_table import comparison_table, difference_table, grid, phase_table, systems_table
from conrec.report.table import Column, bracketed, markdown


def markdown_report(document: Mapping[str, Any], systems: Mapping[str, System]) -> str:
    """Tables of the published lists, systems, comparisons, ablation, coverage, responsiveness, forgetting and verdict.

    `document` is metrics.json; a part that it does not have is left out.
    """
    parts = [f"{table.title}:\n\n{markdown(table)}" for table in headline_tables(document)]
    parts.append(markdown(systems_table(systems, document.get("ours", ""))))
    if document.get("comparisons"):
        parts.append(markdown(comparison_table(document["comparisons"], "its ")))
    if document.get("ablation"):
        steps = [((step["step"],), step["differences"]) for step in document["ablation"]]
        parts.append(markdown(difference_table((Column("step", "words"),), steps)))
    if document.get("target_coverage"):
        parts.append(markdown(grid("target", document["target_coverage"]["shares"])))
    for event in ("rejected", "liked"):
        if event in document.get("responsiveness", {}):
            parts.append(_answer(event, document["responsiveness"][event]))
    if document.get("forgetting"):
        parts.append(markdown(phase_table("alignment accuracy after", document["forgetting"])))
    if document.get("verdict_auc"):
        parts.append(markdown(phase_table("AUC of the verdict after", document["verdict_auc"])))
    return "\n".join(parts)


def _answer(event: str, answer: Mapping[str, Any]) -> str:
    own = {name: figure for name, figure in answer.items() if "value" in figure}
    groups = {name: figures for name, figures in answer.items() if "value" not in figures}
    facts = "; ".join(f"{name} {bracketed(figure)}" for name, figure in own.items())
    return f"One more item {event}: {facts}.\n\n" + markdown(grid("share of items", groups))
