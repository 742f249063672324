"""The report: self-contained, and showing the numbers it was given."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from conrec import storage
from conrec.blocklist.calibrate import Calibration, Stratum, calibrate
from conrec.config import CalibrationSettings
from conrec.evaluation.document import Evaluation, System, read_systems
from conrec.evaluation.metrics import MEASURES
from conrec.ragged import Ragged
from conrec.report.report import report_html, write_report
from conrec.report.system_table import systems_table
from conrec.report.table import terminal

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


def published_system(catch: float, harm: float) -> dict[str, Any]:
    length = {"p5": interval(1, 1), "p50": interval(12, 1), "p95": interval(80, 2), "none": interval(0.03)}
    lists = {
        "0.01": {"catch": interval(catch / 4), "false_block": interval(harm / 4, 0.001)},
        "0.05": {"catch": interval(catch), "false_block": interval(harm)},
    }
    for one in lists.values():
        one |= {"false_block_per_user": interval(harm / 2), "selectivity": interval(catch / harm), "length": length}
    return {
        "at_alpha": lists,
        "catch_at": {"0.01": interval(catch / 4), "0.05": interval(catch), "0.1": interval(min(1.0, catch * 1.5))},
        "auc": interval(0.7),
        "within_user_auc": interval(np.nan),
        "thin": {"few <events>": interval(0.6)},
    }


def published() -> dict[str, Any]:
    """What conrec.evaluation.published_lists leaves, with a system whose name looks like markup."""
    names = {"CoNRec": (0.3, 0.05), "CoNRec without the policy": (0.28, 0.05), "trees <x>": (0.24, 0.04)}
    grid = [0.0, 0.05, 0.1, 0.15]
    rise = np.array([0.0, 1.0, 1.3, np.nan])

    def against(difference: float, ratio: float) -> dict[str, Any]:
        return {
            "auc_difference": interval(difference),
            "within_user_auc_difference": interval(0.0),
            "catch_ratio": {share: interval(ratio) for share in ("0.01", "0.05", "0.1")},
            "catch_difference": {share: interval(difference) for share in ("0.01", "0.05", "0.1")},
            "thin": {"few <events>": interval(0.004)},
        }

    user = {
        "kind": "sure",
        "user": "<17>",
        "rejections": 1234,
        "rejected": [{"words": "Sport & games", "count": 4}, {"words": "News", "count": 1}],
        "length": 37,
        "blocked": [
            {"item": "i1", "words": "Sport", "log_odds": 1.4, "reasons": ["rejected", "verdict"], "window": "rejected"},
            {"item": "i2", "words": "News", "log_odds": -0.7, "reasons": [], "window": "not shown"},
        ],
    }
    return {
        "alpha": 0.05,
        "users": 4321,
        "pairs": {"rejected": 1500, "liked": 6000},
        "systems": {name: published_system(*values) for name, values in names.items()},
        "curves": {
            name: {"false_block": grid, "value": catch * rise, "low": catch * rise * 0.9, "high": catch * rise * 1.1}
            for name, (catch, _) in names.items()
        },
        "against": {"CoNRec without the policy": against(0.005, 1.02), "trees <x>": against(0.06, 1.25)},
        "examples": [user, user | {"kind": "unsure", "user": "u2"}],
    }


def thresholds() -> dict[str, Any]:
    def at(alpha: float, low: float | None) -> Calibration:
        return Calibration(alpha, Stratum(0, None, 900, 0.5, 0.04), (Stratum(0, 4, 0, low, None), MANY))

    served = at(0.05, 0.25)
    return dataclasses.replace(served, others=(at(0.1, 0.125), at(0.01, None))).to_json()


MANY = Stratum(5, None, 600, 0.000123, 0.049)


def evaluation() -> Evaluation:
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
        published=published(),
        calibration=thresholds(),
        score={
            "reach": 1.5,
            "counted": {
                "odds": {"bias": -0.25, "weights": {"rejected": 0.5, "user x category": -2.0, "colour": 0.1}},
                "exposure": {"bias": 0.125, "weights": {"shown": 0.75}},
            },
            "judged": {
                "odds": {"bias": 0.5, "weights": {"rejected": 0.375, "verdict": 3.0}},
                "exposure": {"bias": 0.0, "weights": {"shown": 0.5, "log_prob": 0.25}},
            },
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
    # Published, frontier, two ratios, catch, ablation, responsiveness, forgetting, verdict, two of the training.
    assert html.count("<svg") == html.count("</svg>") == html.count("<figcaption>") == 11
    text = words(html)
    assert "most &lt;shown&gt;" in text and "<shown>" not in html
    assert "<b>.215</b><small>.205 to .225</small>" in text
    assert "<td>.159<td>.169<td>.220" in text, "FPH, FHR, and ours there"
    assert "<b>+.020</b>" in text and "all &lt; before" in text
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
    assert document["published"]["curves"]["trees <x>"]["value"][-1] is None
    assert document["calibration"] == thresholds()
    assert storage.read_bytes(f"{tmp_path}/report.html").decode() == html
    table = storage.read_bytes(f"{tmp_path}/table.md").decode()
    assert "| conrec | ours |" in table and ".215 [.205, .225]" in table
    assert terminal(systems_table(read_systems(document), document["ours"])).row_count == 2


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
    assert ("The thresholds" in headings) == ("calibration" not in names)
    assert ("Three users as they would see it" in headings) == ("published" not in names)
    assert ("What each step adds" in headings) == ("ablation" not in names)
    assert ("How far lasting interests reach" in headings) == ("target_coverage" not in names)
    assert ("Does one more event move the list?" in headings) == ("responsiveness" not in names)


def headings(html: str) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", html)


def rows_below(html: str, title: str) -> list[list[str]]:
    """Cells of the first table below a heading, tags left out."""
    part = words(html).split(f"<h2>{title}</h2>")[1]
    table = part[part.index("<table") : part.index("</table>")]
    rows = re.split("<tr[^>]*>", table)[1:]
    cells = [re.split("<t[hd][^>]*>", row)[1:] for row in rows]
    return [[" ".join(re.sub("<[^>]*>", " ", cell).split()) for cell in row] for row in cells]


def test_the_report_opens_with_what_is_spared_and_lost_then_users_then_tables(html: str) -> None:
    assert headings(html)[:11] == [
        "What the lists spare, and what they lose",
        "Three users as they would see it",
        "How well each system orders what is shown",
        "The lists at their calibrated thresholds",
        "CoNRec less each other system, paired",
        "How many times what each system catches CoNRec catches",
        "What makes a rejection likely",
        "What makes it likely to be met",
        "The thresholds",
        "What is caught, and what it costs",
        "At the same harm",
    ]
    text = words(html)
    assert "At alpha .05, which is served, of 100 coming rejections <b>30 are spared</b>, and of 100 coming" in text
    assert "<b>5.0 are lost</b>, measured on 1,500 rejections and 6,000 likes of 4,321 users." in text
    beside = "our list spares 1.25 times (1.24 to 1.26) as many rejections as a list by trees &lt;x&gt;: a difference"
    assert f"When 5 % of likes are lost, {beside} beyond chance." in text
    assert "a list by CoNRec without the policy" not in text, "no rival, but ours with something left out"
    assert rows_below(html, "What the lists spare, and what they lose") == [
        ["", "CoNRec", "trees &lt;x&gt;", "no list"],
        ["of 100", *["spared", "lost"] * 3],
        ["alpha .01", "7.5 6.5 to 8.5", "1.2 1.1 to 1.4", "6.0 5.0 to 7.0", "1.0 0.9 to 1.1", "0", "0"],
        ["alpha .05", "30 29 to 31", "5.0 4.0 to 6.0", "24 23 to 25", "4.0 3.0 to 5.0", "0", "0"],
    ]
    assert text.count("<tr class=served>") == 1


def test_a_difference_that_chance_may_have_made_is_said_to_be_one() -> None:
    document = published()
    document["against"]["trees <x>"] = document["against"]["CoNRec without the policy"]
    document["against"]["trees <x>"]["catch_difference"] = {"0.05": interval(0.005)}
    html = report_html(Evaluation({}, {}, published=document))
    said = "1.02 times (1.01 to 1.03) as many rejections as a list by trees &lt;x&gt;: a difference"
    assert f"{said} that chance may have made." in html


def test_a_rival_that_catches_nothing_has_no_ratio() -> None:
    document = published()
    document["against"]["trees <x>"]["catch_ratio"]["0.05"] = interval(np.inf)
    html = report_html(Evaluation({}, {}, published=document))
    assert "our list spares more rejections than a list by trees &lt;x&gt;: a difference beyond chance." in html


def test_three_users_are_shown_in_words(html: str) -> None:
    text = words(html)
    assert "<h3>Sure: user &lt;17&gt;</h3>" in text and "<h3>Unsure: user u2</h3>" in text
    assert (
        "Rejected 1,234, most of all: 4 × Sport &amp; games, 1 × News. Blocked by prediction at alpha .05: 37 " in text
    )
    assert rows_below(html, "Three users as they would see it") == [
        ["item", "odds", "because of", "in the window"],
        [
            "i1: Sport",
            "4.1 to 1 that it is rejected",
            "share of those who met it who reject it; whether the policy says rejected or liked of it",
            "rejected",
        ],
        ["i2: News", "2 to 1 that it is liked", "nothing above what is usual", "not shown"],
    ]


def test_the_published_measures_of_every_system_have_their_intervals(html: str) -> None:
    first = rows_below(html, "How well each system orders what is shown")
    catches = [f"catch at {share} %" for share in (1, 5, 10)]
    assert first[0] == ["system", *catches, "AUC", "within-user AUC", "AUC, few &lt;events&gt;"]
    ours = ["CoNRec", ".075 .065 to .085", ".300 .290 to .310", ".450 .440 to .460", ".700 .690 to .710", "–"]
    assert first[1] == [*ours, ".600 .590 to .610"]
    assert [row[0] for row in first[1:]] == ["CoNRec", "CoNRec without the policy", "trees &lt;x&gt;"]
    lists = rows_below(html, "The lists at their calibrated thresholds")
    assert lists[0][:5] == ["system", "alpha", "catch", "false block, pooled", "false block, mean of users"]
    assert lists[0][5:] == ["selectivity", "length p5", "p50", "p95", "none"]
    assert [row[:2] for row in lists[1:3]] == [["CoNRec", ".01"], ["CoNRec", ".05"]]
    figures = [".300 .290 to .310", ".050 .040 to .060", ".025 .015 to .035", "6.00 5.99 to 6.01"]
    lengths = ["1 (0 to 2)", "12 (11 to 13)", "80 (78 to 82)", ".030 .020 to .040"]
    assert lists[2][2:] == figures + lengths
    paired = rows_below(html, "CoNRec less each other system, paired")
    assert paired[2][:3] == ["trees &lt;x&gt;", *["+.060 +.050 to +.070"] * 2]
    assert "<b>+.060</b>" in html and "<b>+.005</b>" not in html
    ratios = rows_below(html, "How many times what each system catches CoNRec catches")
    assert ratios[2][1] == "1.25 1.24 to 1.26"


def test_the_fitted_weights_are_said_in_words_the_largest_first(html: str) -> None:
    assert rows_below(html, "What makes a rejection likely") == [
        ["column", "counted", "with the policy"],
        ["whether the policy says rejected or liked of it", "–", "+3.00"],
        ["what the user said of other items of its category", "-2.00", "–"],
        ["share of those who met it who reject it", "+.500", "+.375"],
        ["how its colour is taken by all users", "+.100", "–"],
        ["where all of these are 0", "-.250", "+.500"],
    ]
    met = rows_below(html, "What makes it likely to be met")
    assert met[1:] == [
        ["how many met it", "+.750", "+.500"],
        ["how readily the policy generates its semantic ID", "–", "+.250"],
        ["where all of these are 0", "+.125", "0"],
    ]
    assert "It counts 1.5 times beside the odds" in html


def test_without_a_policy_its_weights_are_dashes() -> None:
    html = report_html(Evaluation({}, {}, score=dict(evaluation().score) | {"judged": None}))
    assert [row[2] for row in rows_below(html, "What makes a rejection likely")[1:]] == ["–"] * 4


def test_the_thresholds_stand_by_stratum_and_alpha_and_a_missing_one_is_said_in_words(html: str) -> None:
    assert rows_below(html, "The thresholds") == [
        ["of", "calibrated on", "alpha .01", "alpha .05, served", "alpha .1"],
        ["all users", "900", *["0.5 (blocks .040)"] * 3],
        ["users with 0 to 4 rejections", "0", "nothing is predicted", "0.25", "0.125"],
        ["users with 5 rejections or more", "600", *["0.000123 (blocks .049)"] * 3],
    ]


def test_what_is_calibrated_is_what_the_report_reads() -> None:
    rejections = np.repeat([0, 2, 5, 20], 30)
    scores = Ragged.from_lengths((0.1 * (1 + np.repeat(np.arange(4), 30))).astype(np.float32), np.ones(120, int))
    made = calibrate(scores, rejections, CalibrationSettings(alpha=0.1, strata=[1, 3, 10]))
    rows = rows_below(report_html(Evaluation({}, {}, calibration=made.to_json())), "The thresholds")
    served = rows[0].index("alpha .1, served")
    said = [row[served].split(" ")[0] for row in rows[1:]]
    expected = [made.overall.threshold, *(stratum.threshold for stratum in made.strata)]
    assert said == [f"{threshold:.3g}" for threshold in expected]
    assert [row[0] for row in rows[1:]] == ["all users", *(stratum.users for stratum in made.strata)]


@pytest.mark.long
def test_the_opening_picture_is_a_file_that_follows_the_reader_s_scheme(tmp_path: Path) -> None:
    write_report(str(tmp_path), evaluation())
    svg = storage.read_bytes(f"{tmp_path}/published.svg").decode()
    ElementTree.fromstring(svg)
    assert "prefers-color-scheme:dark" in svg and "currentColor" in svg and "#010203" not in svg
    write_report(f"{tmp_path}/without", Evaluation(about={}, systems={}))
    assert not storage.exists(f"{tmp_path}/without/published.svg")
