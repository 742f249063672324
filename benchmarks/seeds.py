"""The evaluations of several seeds side by side.

    for seed in 0 1 2; do
        .venv/bin/conrec run --config examples/kuairand/conrec.toml --set seed=$seed --set root=runs/seed-$seed
    done
    .venv/bin/python benchmarks/seeds.py runs/seed-*/evaluation/*/metrics.json

Prints Markdown: of the published lists the mean of each figure, and its smallest and largest value; of the lists of 20
items, and of a table of rivals (`benchmarks/rivals/table.py` writes one a seed), the mean with an interval over users
and seeds. Its half width to each side is the root of two squares: the half width that the users leave, and Student's of
the mean of the seeds. With `--drawn`, for evaluations whose every seed drew users of its own, it is the larger of
Student's and the users' over the root of the number of seeds: what seeds differ by is then users, too. `--json` names a
file for these means, with the figures of each seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from conrec.report.published_tables import ours_of, percent
from conrec.report.table import bracketed, number

Document = dict[str, Any]
Figure = dict[str, float]
SHARES = ("0.01", "0.05", "0.1")
LISTS = ("FHR", "FPH", "Lift", "catch at 1 %")
EQUAL_HARM = ("ratio", "difference", "catch_ratio", "catch_difference")
"""Of the frontier over a system at its FPH."""


def main() -> None:
    """Reads the files that are named, of evaluations or of tables of rivals; prints their tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="metrics.json, or tables of rivals, one a seed")
    parser.add_argument("--drawn", action="store_true", help="every seed drew users of its own")
    parser.add_argument("--json", type=Path, help="where the means with an interval are written")
    given = parser.parse_args()
    documents = [json.loads(path.read_text()) for path in given.files]
    if "told" in documents[0]:
        tables = {head: [one[head] for one in documents] for head in ("told", "ranked")}
    else:
        if documents[0]["published"] is not None:
            published([one["published"] for one in documents])
        figures = [{name: row["figures"] for name, row in one["systems"].items()} for one in documents]
        comparisons = [one["comparisons"] for one in documents]
        tables = {"system": [rows_of(one, LISTS) for one in figures]}
        tables["20 items, at the FPH of"] = [rows_of(one, EQUAL_HARM) for one in comparisons]
    means = {head: with_intervals(head, rows, given.drawn) for head, rows in tables.items()}
    if given.json is not None:
        given.json.write_text(json.dumps(means, indent=1) + "\n")


def published(documents: list[Document]) -> None:
    """The tables of the published list."""
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


def rows_of(document: Document, columns: Sequence[str]) -> Document:
    """Row -> these columns."""
    return {name: {column: row[column] for column in columns} for name, row in document.items()}


def with_intervals(head: str, documents: list[Document], drawn: bool) -> Document:
    """Prints a row for each system that every document has: means with intervals over users and seeds. Returns them."""
    columns = list(dict.fromkeys(column for row in documents[0].values() for column in row))
    print(f"| {head} | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}")
    rows = {}
    for name in documents[0]:
        if all(name in one for one in documents):
            rows[name] = {column: over_seeds([one[name].get(column) for one in documents], drawn) for column in columns}
            print(f"| {name} | {' | '.join(bracketed(figure) for figure in rows[name].values())} |")
    print()
    return rows


def over_seeds(figures: Sequence[Figure | None], drawn: bool) -> Document | None:
    """The mean of the figures and its 95 % interval; None unless each has one. `drawn`: each of users of its own."""
    ends = np.array([[(one or {}).get(end, np.nan) for end in ("value", "low", "high")] for one in figures], float)
    if np.isnan(ends).any() or len(ends) < 2:
        return None
    values, count = ends[:, 0], len(ends)
    seeds = stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / np.sqrt(count)
    down, up = (np.sqrt(np.mean((ends[:, side] - values) ** 2)) for side in (1, 2))
    down, up = (max(seeds, users / np.sqrt(count)) if drawn else np.hypot(seeds, users) for users in (down, up))
    mean = float(values.mean())
    # Of shares and ratios no interval reaches below 0.
    least = 0.0 if ends.min() >= 0 else -np.inf
    return {"value": mean, "low": max(mean - float(down), least), "high": mean + float(up), "seeds": values.tolist()}


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


def _cell(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return _spread(known) if len(known) == len(values) else "–"


def _spread(values: list[float]) -> str:
    words = [number(value) if value % 1 else f"{value:,.0f}" for value in (min(values), max(values))]
    mean = float(np.mean(values))
    return f"{number(mean) if min(values) % 1 else f'{mean:,.0f}'} ({words[0]} to {words[1]})"


if __name__ == "__main__":
    main()
