"""The report: self-contained, and showing the numbers it was given."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from conrec import storage
from conrec.evaluation.metrics import MEASURES
from conrec.evaluation.report import Evaluation, report_html, summary_table, write_report

TRAINING = [
    *({"phase": "warm_up", "step": step, "loss": 3.0 / step, "tokens_per_second": 1e3} for step in (1, 2, 3)),
    {"phase": "warm_up", "step": 4, "alignment_accuracy": 0.5},
    *(
        {
            "phase": "recent",
            "step": step,
            "loss": 0.0,
            "reward": 0.1,
            "reward_gain": 0.2,
            "reward_penalty": 0.1,
            "kl": 0.0,
        }
        for step in (1, 2)
    ),
    {"phase": "recent", "step": 3, "stage_accepted": False, "before_fhr": 0.2, "before_fph": 0.1},
]


def system(**values: float) -> dict[str, dict[str, float]]:
    return {
        measure: {"value": value, "low": value * 0.9, "high": value * 1.1}
        for measure, value in (dict.fromkeys(MEASURES, 0.1) | values).items()
    }


def evaluation() -> Evaluation:
    stratum = {"min_rejections": 0, "max_rejections": None, "anchors": 300, "theta": 0.83, "false_block": 0.009}
    return Evaluation(
        about={"cut": "2022-05-01T16:00Z", "anchors": 4380},
        systems={
            "most <shown>": system(FHR=0.169, FPH=0.159),
            "conrec": system(FHR=0.215, FPH=0.16, LIF=np.nan, Lift=np.inf),
        },
        ours=["conrec"],
        frontiers={"line": ["most <shown>", "conrec", "not measured"]},
        differences={"conrec - most shown": system(FHR=0.046)},
        quality={"codes_used": [64, 63], "stability": {"other_seed": 0.25}},
        calibration={"alpha": 0.01, "overall": stratum, "strata": [stratum | {"theta": None}]},
        curve={"theta": [0.0, 0.5, 1.0], "false_block": [0.5, 0.01, 0.0], "catch": [0.9, 0.1, np.nan]},
        training=TRAINING,
    )


@pytest.fixture(scope="module")
def html() -> str:
    return report_html(evaluation())


class Links(HTMLParser):
    """Collects what a browser would fetch, and the text of each table row."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [
            value for name, value in attrs if name.split(":")[-1] in ("src", "href") and value and value[0] != "#"
        ]
        if tag in ("script", "link", "iframe", "object"):
            self.fetched.append(tag)


def test_the_report_loads_nothing_and_fits_a_phone(html: str) -> None:
    links = Links()
    links.feed(html)
    assert links.fetched == []
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert 'name=viewport content="width=device-width' in html
    assert "prefers-color-scheme: dark" in html


def test_the_report_shows_every_system_and_marks_the_best(html: str) -> None:
    assert "most &lt;shown&gt;" in html
    assert "<b>.215</b>" in html
    assert "<td>.169<small>.152 to .186</small>" in html
    assert "<b>.159</b>" not in html, "the least harm alone is no merit"
    assert html.count("<svg") == html.count("</svg>") == 4
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", html, flags=re.S).lower()


def test_text_of_pictures_takes_the_colour_of_the_page(html: str) -> None:
    assert "currentColor" in html
    assert "#010203" not in html


def test_metrics_json_is_strict_json_with_null_for_undefined(tmp_path: Path, html: str) -> None:
    write_report(str(tmp_path), evaluation())
    text = storage.read_bytes(f"{tmp_path}/metrics.json").decode()
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    figures = document["systems"]["conrec"]["figures"]
    assert figures["FHR"]["value"] == 0.215
    assert figures["LIF"] == {"value": None, "low": None, "high": None}
    assert figures["Lift"]["value"] is None
    assert document["systems"]["conrec"]["ours"] is True
    assert document["curve"]["catch"] == [0.9, 0.1, None]
    assert storage.read_bytes(f"{tmp_path}/report.html").decode() == html


def test_a_report_of_floors_alone_leaves_the_rest_out() -> None:
    html = report_html(Evaluation(about={}, systems={"random": system()}))
    assert "<h2>Training" not in html
    assert "<h2>theta" not in html
    assert html.count("<svg") == 1


def test_no_theta_is_said_in_words() -> None:
    whole = evaluation()
    overall = dict(whole.calibration["overall"]) | {"theta": None}
    calibration = dict(whole.calibration) | {"overall": overall}
    html = report_html(Evaluation(about={}, systems={"random": system()}, calibration=calibration, curve=whole.curve))
    assert "No theta keeps the promise" in html


def test_the_summary_fits_eighty_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table({"exposure x rejection rate^2": system(), **evaluation().systems}, ["conrec"]))
    lines = console.export_text().splitlines()
    assert len(lines) == 4
    assert lines[0].split() == ["system", *MEASURES]
    assert lines[3].split() == ["conrec", ".100", ".215", ".100", ".100", "–", ".160", "–"]
