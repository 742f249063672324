"""The report: self-contained, and showing the numbers it was given."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conrec import storage
from conrec.blocklist.calibrate import calibrate
from conrec.config import CalibrationSettings
from conrec.evaluation.curves import activity_labels
from conrec.evaluation.metrics import MEASURES
from conrec.evaluation.report import Evaluation, System, read_systems, report_html, summary_table, write_report
from conrec.ragged import Ragged

TRAINING = [
    *({"phase": "warm_up", "step": step, "loss": 3.0 / step, "tokens_per_second": 1e3} for step in (1, 2, 3)),
    {"phase": "warm_up", "step": 4, "alignment_accuracy": 0.5},
    *({"phase": "recent", "step": step, "loss": 0.0, "reward": 0.1, "kl": 0.0} for step in (1, 2)),
    {"phase": "recent", "step": 3, "stage_accepted": False, "before_fhr": 0.2, "before_fph": 0.1},
]


def interval(value: float, width: float = 0.01) -> dict[str, float]:
    return {"value": value, "low": value - width, "high": value + width}


def figures(**values: float) -> dict[str, dict[str, float]]:
    return {measure: interval(value) for measure, value in (dict.fromkeys(MEASURES, 0.1) | values).items()}


def comparison(ratio: float, catch: float) -> dict[str, Any]:
    return {
        "FPH": 0.159,
        "FHR": 0.169,
        "ours": 0.169 * ratio,
        "difference": interval(0.169 * (ratio - 1)),
        "ratio": interval(ratio),
        "catch_difference": interval(catch / 10 - 0.1),
        "catch_ratio": interval(catch),
    }


def evaluation() -> Evaluation:
    stratum = {"min_rejections": 0, "max_rejections": None, "anchors": 300, "theta": 0.83, "false_block": 0.009}
    shares = {"theta": [0.0, 0.5, 1.0], "false_block": [0.5, 0.01, 0.0], "catch": [0.9, 0.1, np.nan]}
    answer = {
        "newly blocked": interval(2.5),
        "same code": {"newly blocked": interval(0.21), "blocked before": interval(0.05)},
        "liked later": {"newly blocked": interval(0.02), "newly unblocked": interval(0.03)},
    }
    return Evaluation(
        about={"cut": "2022-05-01T16:00Z", "anchors": 4380},
        systems={
            "most <shown>": System("floor", figures(FHR=0.169, FPH=0.159)),
            "conrec": System("ours", figures(FHR=0.215, FPH=0.16, LIF=np.nan, Lift=np.inf), 60.0, np.int64(900), 3.0),
        },
        ours="conrec",
        lines={"by contrast": [{"label": "0", "FHR": interval(0.2), "FPH": interval(np.nan)}]},
        catch_curves={"conrec": {"false_block": [0.0, 0.05], "catch": [0.0, np.nan]}},
        comparisons={
            "most <shown>": comparison(1.3, 1.05),
            "hard": comparison(1.02, 0.8),
            "nothing": comparison(2, np.inf),
        },
        ablation=[{"step": "+ penalty", "against": "all < before", "differences": {"FHR": interval(0.02)}}],
        differences={"S-DPO - warm-up": figures(FHR=0.046)},
        theta={
            "alpha": 0.01,
            "calibration": {"alpha": 0.01, "overall": stratum, "strata": [stratum | {"theta": None}]},
            "curves": {"all": shares, "long-tail items": shares},
            "promise": {"mean": 0.0087, "splits": 200, "with_theta": 1.0},
        },
        target_coverage={
            "lookback_days": 60.0,
            "shares": {"window": {"top 1": interval(0.21), "top 4": interval(0.44)}},
        },
        responsiveness={"anchors": 1000, "rejected": answer, "liked": answer},
        forgetting={"conrec": {"alignment": 0.7, "all": 0.6}},
        verdict_auc={"conrec": {"warm_up": 0.68, "all": 0.67}},
        quality={"codes_used": [64, 63], "stability": {"other_seed": 0.25}, "purity": None},
        training=TRAINING,
    )


@pytest.fixture(scope="module")
def html() -> str:
    return report_html(evaluation())


class Links(HTMLParser):
    """Collects what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [
            value for name, value in attrs if name.split(":")[-1] in ("src", "href") and value and value[0] != "#"
        ]
        if tag in ("script", "link", "iframe", "object"):
            self.fetched.append(tag)


def words(html: str) -> str:
    """The page without its pictures and its style."""
    return re.sub(r"<svg.*?</svg>|<style>.*?</style>", "", html, flags=re.S)


def test_the_report_loads_nothing_and_fits_a_phone(html: str) -> None:
    links = Links()
    links.feed(html)
    assert links.fetched == []
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert 'name=viewport content="width=device-width' in html
    assert "prefers-color-scheme: dark" in html
    assert "currentColor" in html and "#010203" not in html


def test_every_part_is_shown_with_its_numbers(html: str) -> None:
    # Frontier, two ratios, catch, ablation, theta, responsiveness, forgetting, verdict, two of the training.
    assert html.count("<svg") == html.count("</svg>") == html.count("<figcaption>") == 11
    text = words(html)
    assert "most &lt;shown&gt;" in text and "<shown>" not in html
    assert "<b>.215</b><small>.205 to .225</small>" in text
    assert "<td>.159<td>.169<td>.220" in text, "FPH, FHR, and ours there"
    assert "<b>+.020</b>" in text and "all &lt; before" in text
    assert "<tr><th>mean<td>.009" in text and "<tr><th>with theta<td>1" in text
    assert "<td class=words>window<td>.210<small>.200 to .220</small>" in text
    assert "<tr><th>newly blocked<td>2.50 (2.49 to 2.51)" in text
    assert (
        "<td class=words>same code<td>.210<small>.200 to .220</small><td>.050<small>.040 to .060</small><td>–" in text
    )
    assert "<tr><th>codes used<td>64, 63</tr><tr><th>stability: other seed<td>.250</tr><tr><th>purity<td>–" in text
    assert "nan" not in text.lower() and "None" not in text


def test_the_verdict_counts_wins_beyond_chance_and_as_wanted(html: str) -> None:
    text = words(html)
    # Differences +.051, +.003 and +.169 with a width of .01; ratios 1.3, 1.02 and 2 against 1.15.
    assert "FHR of the full method is above that of <b>3 of 3</b> systems, 2 of them beyond" in text
    assert "beyond chance, 2 of them 1.15 times or more." in text
    # Catch: +.005 is not beyond its width, -.02 is a loss, and the third catches nothing at all: no difference known.
    assert "Catch at 1 % false block of the full method is above that of <b>1 of 2</b> systems" in text
    assert "systems, 0 of them beyond chance, 0 of them 1.25 times or more." in text


@pytest.mark.long
def test_metrics_json_is_strict_json_with_null_for_undefined(tmp_path: Path, html: str) -> None:
    write_report(str(tmp_path), evaluation())
    text = storage.read_bytes(f"{tmp_path}/metrics.json").decode()
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert set(document) == {part.name for part in dataclasses.fields(Evaluation)} - {"training"}
    ours = document["systems"]["conrec"]
    assert ours["figures"]["FHR"]["value"] == 0.215
    assert ours["figures"]["LIF"] == {"value": None, "low": None, "high": None}
    assert ours["figures"]["Lift"]["value"] is None
    assert (ours["group"], ours["parameters"], ours["training_seconds"]) == ("ours", 900, 60.0)
    assert document["ours"] == "conrec"
    assert document["theta"]["curves"]["all"]["catch"] == [0.9, 0.1, None]
    assert storage.read_bytes(f"{tmp_path}/report.html").decode() == html
    table = storage.read_bytes(f"{tmp_path}/table.md").decode()
    assert "| conrec | ours |" in table and ".215 [.205, .225]" in table
    assert summary_table(read_systems(document), document["ours"]).row_count == 2


def test_a_report_of_floors_alone_leaves_the_rest_out() -> None:
    html = report_html(Evaluation(about={}, systems={"random": System("floor", figures())}))
    assert re.findall("<h2>(.*?)</h2>", html) == ["What is caught, and what it costs", "All systems"]
    assert html.count("<svg") == 1


@pytest.mark.long
@pytest.mark.parametrize("half", [0, 1])
def test_each_part_stands_without_the_others(half: int) -> None:
    nothing = Evaluation(about={}, systems={})
    names = [part.name for part in dataclasses.fields(Evaluation)][half::2]
    html = report_html(dataclasses.replace(evaluation(), **{name: getattr(nothing, name) for name in names}))
    headings = re.findall("<h2>(.*?)</h2>", html)
    assert ("What each step adds" in headings) == ("ablation" not in names)
    assert ("How far lasting interests reach" in headings) == ("target_coverage" not in names)
    assert ("Does one more event move the list?" in headings) == ("responsiveness" not in names)


@pytest.mark.long
def test_no_theta_is_said_in_words() -> None:
    theta = dict(evaluation().theta)
    calibration = theta["calibration"] | {"overall": theta["calibration"]["overall"] | {"theta": None}}
    html = report_html(dataclasses.replace(evaluation(), theta=theta | {"calibration": calibration}))
    assert "No theta keeps the promise" in html


@pytest.mark.long
def test_each_stratum_of_users_is_marked_with_its_own_theta() -> None:
    """The labels of the curves and the strata of the calibration are made by two modules, and must name the same."""
    borders = [1, 3, 10]
    rejections = np.repeat([0, 2, 5, 20], 30)
    similarities = Ragged.from_lengths((0.1 * (1 + np.repeat(np.arange(4), 30))).astype(np.float32), np.ones(120, int))
    calibration = calibrate(similarities, rejections, CalibrationSettings(alpha=0.1, strata=borders))
    shares = {"theta": [0.0, 1.0], "false_block": [0.5, 0.1], "catch": [1.0, 0.2]}
    labels = [*activity_labels(rejections, borders), "head items"]
    html = report_html(
        Evaluation(
            about={},
            systems={},
            theta={
                "alpha": 0.1,
                "calibration": calibration.to_json(),
                "curves": dict.fromkeys(labels, shares),
            },
        )
    )
    assert [stratum.theta for stratum in calibration.strata] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert calibration.overall.theta == pytest.approx(0.4)
    assert re.findall(r"theta (\d\.\d{3})", html) == ["0.100", "0.200", "0.300", "0.400", "0.400"]
    for label in labels[:-1]:
        assert f"<td class=words>{label}<td>30" in html
