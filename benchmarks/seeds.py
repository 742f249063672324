"""The evaluations of several seeds side by side: the mean of each figure, and its smallest and largest value.

    for seed in 0 1 2; do
        .venv/bin/conrec run --config examples/kuairand/conrec.toml --set seed=$seed --set root=runs/seed-$seed
    done
    .venv/bin/python benchmarks/seeds.py runs/seed-*/evaluation/*/metrics.json

Prints Markdown.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from conrec.report.published_tables import ours_of, percent
from conrec.report.table import number

Document = dict[str, Any]
SHARES = ("0.01", "0.05", "0.1")


def main() -> None:
    """Reads the metrics.json that are named; prints the tables of the published list, and that of equal harm."""
    if len(sys.argv) < 2:
        raise SystemExit("name the metrics.json of at least one evaluation")
    evaluations = [json.loads(Path(name).read_text()) for name in sys.argv[1:]]
    documents = [one["published"] for one in evaluations]
    alpha = f"{documents[0]['alpha']:g}"
    systems: dict[str, Callable[[Document], Document]] = {
        **{f"catch at {percent(share)}": _at("catch_at", share) for share in SHARES},
        "AUC": _at("auc"),
        "within-user AUC": _at("within_user_auc"),
        f"catch, alpha {alpha}": _at("at_alpha", alpha, "catch"),
        "false block": _at("at_alpha", alpha, "false_block"),
        "mean of users": _at("at_alpha", alpha, "false_block_per_user"),
        "selectivity": _at("at_alpha", alpha, "selectivity"),
        "items p50": _at("at_alpha", alpha, "length", "p50"),
    }
    table("system", [one["systems"] for one in documents], systems)
    against: dict[str, Callable[[Document], Document]] = {
        "AUC": _at("auc_difference"),
        "within-user AUC": _at("within_user_auc_difference"),
        **{f"catch ratio at {percent(share)}": _at("catch_ratio", share) for share in SHARES},
        **{f"AUC, {label}": _at("thin", label) for label in documents[0]["systems"][_ours(documents)]["thin"]},
    }
    table(f"{_ours(documents)} against", [one["against"] for one in documents], against)
    equal_harm = {"FHR, times": _at("ratio"), "FHR, more": _at("difference")}
    table("20 items, at the FPH of", [one["comparisons"] for one in evaluations], equal_harm)


def table(head: str, documents: list[Document], columns: dict[str, Callable[[Document], Document]]) -> None:
    """One row a system that every document has."""
    print(f"| {head} | {' | '.join(columns)} |")
    print(f"| --- |{' ---: |' * len(columns)}")
    for name in documents[0]:
        if all(name in one for one in documents):
            cells = (_cell([of(one[name])["value"] for one in documents]) for of in columns.values())
            print(f"| {name} | {' | '.join(cells)} |")
    print()


def _ours(documents: list[Document]) -> str:
    return ours_of(documents[0])


def _at(*path: str) -> Callable[[Document], Document]:
    def of(document: Document) -> Document:
        for name in path:
            document = document[name]
        return document

    return of


def _cell(values: list[float]) -> str:
    words = [number(value) if value % 1 else f"{value:,.0f}" for value in (min(values), max(values))]
    mean = float(np.mean(values))
    return f"{number(mean) if min(values) % 1 else f'{mean:,.0f}'} ({words[0]} to {words[1]})"


if __name__ == "__main__":
    main()
