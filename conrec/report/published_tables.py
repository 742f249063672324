"""The headline of an evaluation as tables, once for report.html and table.md.

    for table in headline_tables(document):
        page = html(table)      # conrec.report.table

Invariant: a table says what metrics.json says, and names what each figure measures in its head; a cell is words or a
figure with its interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from conrec.blocklist.calibrate import Calibration, Stratum
from conrec.report.table import Cell, Column, Row, Table, number
from conrec.report.words import alpha_words, column_words

LENGTHS = {"p5": "length p5", "p50": "p50", "p95": "p95"}
_BLOCKS = {"catch": "catch", "false_block": "false block, pooled", "false_block_per_user": "false block, mean of users"}


def has_lists(published: Mapping[str, Any]) -> bool:
    """Whether lists were measured: beside the floors alone, systems from outside may have scored pairs, and no more."""
    return any(system.get("at_alpha") for system in published.get("systems", {}).values())


def ours_of(published: Mapping[str, Any]) -> str:
    """The full method among the systems of the document: the one that the others are compared with."""
    return next(name for name in published["systems"] if name not in published["against"])


def rivals_of(published: Mapping[str, Any]) -> list[str]:
    """Systems that are not ours with something left out."""
    ours = ours_of(published)
    return [name for name in published["systems"] if not name.startswith(ours)]


def headline_tables(document: Mapping[str, Any]) -> list[Table]:
    """What a metrics.json says of the published lists, of the fitted score and of its thresholds, in this order."""
    makers = (("published", published_tables), ("score", score_tables), ("calibration", threshold_tables))
    return [table for part, make in makers if document.get(part) for table in make(document[part])]


def published_tables(published: Mapping[str, Any]) -> list[Table]:
    """The measures of every system, its lists at every alpha, and ours against each other one; none without a row."""
    systems = published["systems"]
    shares = list(dict.fromkeys(share for system in systems.values() for share in system["catch_at"]))
    thin = list(dict.fromkeys(label for system in systems.values() for label in system["thin"]))
    catches, areas = (f"catch at {percent(share)}" for share in shares), (f"AUC, {label}" for label in thin)
    measures = (*catches, "AUC", "within-user AUC", *areas)
    tables = [
        _table(
            "How well each system orders what is shown",
            "published systems",
            ("system", *measures),
            [
                [
                    name,
                    *(system["catch_at"].get(share, {}) for share in shares),
                    system["auc"],
                    system["within_user_auc"],
                    *(system["thin"].get(label, {}) for label in thin),
                ]
                for name, system in systems.items()
            ],
        ),
        _table(
            "The lists at their calibrated thresholds",
            "published lists",
            ("system", "alpha", *_BLOCKS.values(), "selectivity", *LENGTHS.values(), "none"),
            [
                [
                    name,
                    alpha_words(alpha).removeprefix("alpha "),
                    *(lists[measure] for measure in _BLOCKS),
                    lists["selectivity"],
                    *(_items(lists["length"].get(end, {})) for end in LENGTHS),
                    lists["length"].get("none", {}),
                ]
                for name, system in systems.items()
                for alpha, lists in system["at_alpha"].items()
            ],
            words=2,
        ),
    ]
    if published["against"]:
        ours = ours_of(published)
        tables.append(_against(ours, published["against"], measures, shares, thin))
        tables.append(
            _table(
                f"How many times what each system catches {ours} catches",
                "published ratios",
                ("against", *(f"catch ratio at {percent(share)}" for share in shares)),
                [
                    [name, *(pair["catch_ratio"].get(share, {}) for share in shares)]
                    for name, pair in published["against"].items()
                ],
            )
        )
    return [table for table in tables if table.rows]


def _against(
    ours: str, against: Mapping[str, Any], measures: Sequence[str], shares: Sequence[str], thin: Sequence[str]
) -> Table:
    rows = [
        [
            name,
            *(pair["catch_difference"].get(share, {}) for share in shares),
            pair["auc_difference"],
            pair["within_user_auc_difference"],
            *(pair["thin"].get(label, {}) for label in thin),
        ]
        for name, pair in against.items()
    ]
    title = f"{ours} less each other system, paired"
    return _table(title, "published against", ("against", *measures), rows, differences=True)


def score_tables(score: Mapping[str, Any]) -> list[Table]:
    """The fitted weights of both parts of the score, the largest first."""
    tables = []
    for part, title in (("odds", "What makes a rejection likely"), ("exposure", "What makes it likely to be met")):
        fitted = [(score.get(form) or {}).get(part, {}) for form in ("counted", "judged")]
        weights = [one.get("weights", {}) for one in fitted]
        sizes: dict[str, float] = {}
        for one in weights:
            for name, weight in one.items():
                sizes[name] = max(sizes.get(name, 0.0), abs(weight))
        order = sorted(sizes, key=lambda name: (-sizes[name], name))
        rows: list[list[Cell]] = [
            [column_words(name), *(number(one.get(name), signed=True) for one in weights)] for name in order
        ]
        rows.append(["where all of these are 0", *(number(one.get("bias"), signed=True) for one in fitted)])
        tables.append(_table(title, f"score {part}", ("column", "counted", "with the policy"), rows))
    return tables


def threshold_tables(calibration: Mapping[str, Any]) -> list[Table]:
    """The thresholds by stratum and alpha, with the share of likes that each blocked where it was calibrated."""
    served = Calibration.from_json(dict(calibration))
    everything = sorted((served, *served.others), key=lambda one: one.alpha)
    heads = [f"{alpha_words(one.alpha)}{', served' * (one is served)}" for one in everything]
    rows: list[list[Cell]] = []
    for place in range(-1, len(served.strata)):
        strata = [one.overall if place < 0 else one.strata[place] for one in everything]
        who = "all users" if place < 0 else strata[0].users
        rows.append([who, f"{strata[0].calibrated_on:,}", *map(_threshold, strata)])
    return [_table("The thresholds", "thresholds", ("of", "calibrated on", *heads), rows)]


def _threshold(stratum: Stratum) -> str:
    if stratum.threshold is None:
        return "nothing is predicted"
    blocked = "" if stratum.false_block is None else f" (blocks {number(stratum.false_block)})"
    return f"{stratum.threshold:.3g}{blocked}"


def _items(figure: Mapping[str, float | None]) -> str:
    """A number of items, which has no decimals."""
    value, low, high = (figure.get(end) for end in ("value", "low", "high"))
    if value is None:
        return "–"
    return f"{value:,.0f}" if low is None or high is None else f"{value:,.0f} ({low:,.0f} to {high:,.0f})"


def percent(share: str | float) -> str:
    """`5 %`."""
    return f"{100 * float(share):g} %"


def _table(
    title: str,
    key: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    words: int = 1,
    differences: bool = False,
) -> Table:
    """`words`: how many columns are words; of `differences`, those beyond chance are bold."""
    columns = [
        Column(head, "words" if place == 0 else "word")
        if place < words
        else Column(head, signed=differences, bold="sure" if differences else None)
        for place, head in enumerate(heads)
    ]
    return Table(columns, [Row(row) for row in rows], title, key)
