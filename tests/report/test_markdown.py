"""The figures in Markdown: every section of the document, nothing for what it lacks, a dash for what is undefined."""

from __future__ import annotations

from typing import Any

import pytest

from conrec.evaluation.document import System
from conrec.report.markdown import markdown_report
from conrec.report.system_table import systems_table
from conrec.report.table import markdown


def figure(value: float | None, low: float | None = None, high: float | None = None) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": high}


STRATUM = ("min_rejections", "max_rejections", "calibrated_on", "threshold", "false_block")
SYSTEMS = {"most shown": System("floor", {"FHR": figure(0.2, 0.1, 0.3)})}
TABLE = markdown(systems_table(SYSTEMS, ""))
PUBLISHED: dict[str, Any] = {
    "alpha": 0.05,
    "systems": {
        name: {
            "at_alpha": {
                "0.05": {
                    "catch": figure(catch, catch - 0.01, catch + 0.01),
                    "false_block": figure(0.04, 0.03, 0.05),
                    "false_block_per_user": figure(0.045, 0.035, 0.055),
                    "selectivity": figure(None),
                    "length": {"p5": figure(0, 0, 1), "p50": figure(7, 6, 8), "p95": figure(150, 140, 160)},
                }
            },
            "catch_at": {"0.01": figure(0.1, 0.09, 0.11)},
            "auc": figure(0.7, 0.69, 0.71),
            "within_user_auc": figure(0.6, 0.59, 0.61),
            "thin": {},
        }
        for name, catch in (("ours", 0.3), ("trees | x", 0.2))
    },
    "against": {
        "trees | x": {
            "catch_difference": {"0.01": figure(0.02, 0.01, 0.03)},
            "catch_ratio": {"0.01": figure(1.25, 1.1, 1.4)},
            "auc_difference": figure(-0.01, -0.02, 0.0),
            "within_user_auc_difference": figure(None),
            "thin": {},
        }
    },
}
DOCUMENT: dict[str, Any] = {
    "published": PUBLISHED,
    "score": {"counted": {"odds": {"bias": 0.5, "weights": {"liked": -1.5}}}, "judged": None},
    "calibration": {
        "alpha": 0.05,
        "overall": (overall := dict(zip(STRATUM, (0, None, 90, 0.5, 0.04), strict=True))),
        "strata": [overall],
    },
    "comparisons": {
        "most | shown": {
            "FPH": 0.15,
            "FHR": 0.2,
            "ours": 0.25,
            "difference": figure(0.05, -0.01, 0.11),
            "ratio": figure(1.25, 0.95, None),
            "catch_difference": figure(-0.002, -0.004, 0.0),
        },
        "nothing": {"FPH": None, "FHR": None, "ours": None, "difference": figure(None), "ratio": figure(None)},
    },
    "ablation": [
        {"step": "+ alignment", "against": "warm-up", "differences": {"FPH": figure(0.01, -0.01, 0.03)}},
        {"step": "+ GRPO", "against": "alignment", "differences": {"FHR": figure(-0.02, -0.03, -0.01)}},
    ],
    "target_coverage": {
        "shares": {
            "next rejection": {"top 1": figure(0.31, 0.3, 0.32), "top 4": figure(0.6, 0.59, 0.61)},
            "window": {"top 4": figure(0.9, 0.89, 0.91)},
        }
    },
    "responsiveness": {
        "rejected": {
            "newly blocked": figure(3.5, 3.25, 3.75),
            "same code": {"newly blocked": figure(0.4, 0.35, 0.45), "blocked before": figure(0.1, 0.05, 0.15)},
            "same category": {"blocked before": figure(0.5, 0.45, 0.55)},
        },
        "liked": {"newly unblocked": figure(1.5, 1.25, 1.75), "same code": {"newly unblocked": figure(None)}},
    },
    "forgetting": {"before": {"alignment": 0.45, "warm_up": 0.4}, "after": {"alignment": 0.45, "recent": None}},
    "verdict_auc": {"after": {"warm_up": 0.683, "recent": 0.675}},
}


def tables(text: str) -> list[list[list[str]]]:
    """Cells of every table of the text, the line of dashes left out."""
    found: list[list[list[str]]] = []
    previous = ""
    for line in text.splitlines():
        if line.startswith("|"):
            if not previous.startswith("|"):
                found.append([])
            if not line.startswith("| ---"):
                found[-1].append([cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")])
        previous = line
    return found


def test_every_section_in_the_order_of_the_report() -> None:
    text = markdown_report(DOCUMENT, SYSTEMS)
    assert f"\n\n{TABLE}\n" in text
    ordered, lists, paired, ratios, weights, exposure, limits, *rest = tables(text)
    assert text.startswith("How well each system orders what is shown:\n\n| system |")
    assert ordered == [
        ["system", "catch at 1 %", "AUC", "within-user AUC"],
        ["ours", ".100 [.090, .110]", ".700 [.690, .710]", ".600 [.590, .610]"],
        ["trees / x", ".100 [.090, .110]", ".700 [.690, .710]", ".600 [.590, .610]"],
    ]
    assert lists[1][:6] == ["ours", ".05", ".300 [.290, .310]", ".040 [.030, .050]", ".045 [.035, .055]", "–"]
    assert lists[1][6:] == ["0 (0 to 1)", "7 (6 to 8)", "150 (140 to 160)", "–"]
    assert lists[2][:3] == ["trees / x", ".05", ".200 [.190, .210]"]
    assert paired[1:] == [["trees / x", "+.020 [+.010, +.030]", "-.010 [-.020, 0]", "–"]]
    assert ratios[1:] == [["trees / x", "1.25 [1.10, 1.40]"]]
    assert weights[1:] == [
        ["share of those who met it who like it", "-1.50", "–"],
        ["where all of these are 0", "+.500", "–"],
    ]
    assert exposure[1:] == [["where all of these are 0", "–", "–"]]
    assert limits[1:] == [
        ["all users", "90", "0.5 (blocks .040)"],
        ["users with 0 rejections or more", "90", "0.5 (blocks .040)"],
    ]
    _, comparisons, steps, coverage, rejected, liked, forgetting, verdict = rest
    assert comparisons == [
        ["system", "its FPH", "its FHR", "ours there", "difference", "ratio", "catch difference", "catch ratio"],
        ["most / shown", ".150", ".200", ".250", "+.050 [-.010, +.110]", "1.25", "-.002 [-.004, 0]", "–"],
        ["nothing", "–", "–", "–", "–", "–", "–", "–"],
    ]
    # Measures stand in the order of the table of systems, whatever step has them first.
    assert steps == [
        ["step", "FHR", "FPH"],
        ["+ alignment", "–", "+.010 [-.010, +.030]"],
        ["+ GRPO", "-.020 [-.030, -.010]", "–"],
    ]
    assert coverage == [
        ["target", "top 1", "top 4"],
        ["next rejection", ".310 [.300, .320]", ".600 [.590, .610]"],
        ["window", "–", ".900 [.890, .910]"],
    ]
    assert "One more item rejected: newly blocked 3.50 [3.25, 3.75].\n\n|" in text
    assert rejected == [
        ["share of items", "newly blocked", "blocked before"],
        ["same code", ".400 [.350, .450]", ".100 [.050, .150]"],
        ["same category", "–", ".500 [.450, .550]"],
    ]
    assert "One more item liked: newly unblocked 1.50 [1.25, 1.75].\n\n|" in text
    assert liked == [["share of items", "newly unblocked"], ["same code", "–"]]
    assert forgetting == [
        ["alignment accuracy after", "alignment", "warm_up", "recent"],
        ["before", ".450", ".400", "–"],
        ["after", ".450", "–", "–"],
    ]
    assert verdict == [["AUC of the verdict after", "warm_up", "recent"], ["after", ".683", ".675"]]


def test_tables_are_closed_by_an_empty_line_and_as_wide_as_their_head() -> None:
    text = markdown_report(DOCUMENT, SYSTEMS)
    for table in tables(text):
        assert {len(row) for row in table} == {len(table[0])}
    lines = text.splitlines()
    for place in (number for number, line in enumerate(lines) if line.startswith("| ---")):
        assert lines[place - 2] == "", "Markdown needs an empty line before a table"


def test_a_document_of_systems_alone_is_their_table() -> None:
    assert markdown_report({}, SYSTEMS) == TABLE
    empty = {
        "comparisons": {},
        "ablation": [],
        "published": {},
        "score": {},
        "target_coverage": {},
        "responsiveness": {},
    }
    assert markdown_report(empty | {"forgetting": {}, "verdict_auc": {}}, SYSTEMS) == TABLE


@pytest.mark.parametrize("name", list(DOCUMENT))
def test_a_section_that_is_missing_leaves_the_others(name: str) -> None:
    rest = {key: part for key, part in DOCUMENT.items() if key != name}
    fewer, whole = markdown_report(rest, SYSTEMS).splitlines(), markdown_report(DOCUMENT, SYSTEMS).splitlines()
    assert set(fewer) < set(whole)
