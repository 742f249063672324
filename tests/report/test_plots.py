"""Pictures are read off their artists: what was given is what is drawn."""

from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from conrec.report.drawing import BLUE, GREEN, GREY, ORANGE, PINK
from conrec.report.plots import (
    ablation_plot,
    catch_plot,
    forgetting_plot,
    frontier_plot,
    group_of,
    published_plot,
    ratio_plot,
    responsiveness_plot,
    verdict_plot,
)


def interval(value: float | None, width: float = 0.01) -> dict[str, float | None]:
    return {"value": value, "low": None if value is None else value - width, "high": value and value + width}


def system(group: str, fhr: float | None, fph: float | None) -> dict[str, Any]:
    return {"group": group, "figures": {"FHR": interval(fhr), "FPH": interval(fph)}}


def point(label: str, fhr: float | None, fph: float | None) -> dict[str, Any]:
    return {"label": label, "FHR": interval(fhr), "FPH": interval(fph)}


def curve(axes: Axes, label: str) -> Any:
    lines = [line for line in axes.get_lines() if line.get_label() == label]
    assert len(lines) == 1, label
    return lines[0]


def dots(axes: Axes) -> dict[tuple[float, float], str]:
    """Place of every dot -> its colour."""
    return {
        tuple(np.round(place, 6).tolist()): to_hex(colour)
        for dots in axes.collections
        for place in dots.get_offsets().filled(np.nan)
        for colour in dots.get_facecolor()
    }


SYSTEMS = {
    "most shown": system("floor", 0.2, 0.15),
    "undefined": system("sequential", None, 0.1),
    "floor^2": system("floor", 0.1, 0.05),
    "TIGER": system("generative", 0.15, 0.1),
    "some steps": system("ablation", 0.25, 0.2),
    "conrec": system("ours", 0.3, 0.2),
}
LINES = {
    "floor": [point("0", 0.2, 0.18), point("1", None, 0.1), point("2", 0.1, 0.05)],
    "conrec, by contrast": [point("0", 0.35, 0.3), point("1", 0.3, 0.2)],
    "conrec, by gamma": [point("low", 0.33, 0.25)],
}


def test_frontier_draws_every_system_in_the_colour_of_its_group_and_skips_the_undefined() -> None:
    axes = frontier_plot(SYSTEMS, "conrec", LINES).axes[0]
    assert dots(axes) == {
        (0.15, 0.2): GREY,
        (0.05, 0.1): GREY,
        (0.1, 0.15): GREEN,
        (0.2, 0.25): PINK,
        (0.2, 0.3): ORANGE,
    }
    crosses = [line.get_xydata().tolist() for line in axes.get_lines()]
    assert [[0.19, 0.3], [0.21, 0.3]] in np.round(crosses_of(crosses), 6).tolist()
    assert [[0.2, 0.29], [0.2, 0.31]] in np.round(crosses_of(crosses), 6).tolist()


def crosses_of(lines: list[list[list[float]]]) -> list[list[list[float]]]:
    return [line for line in lines if len(line) == 2]


def test_frontier_numbers_are_those_of_the_table_and_some_bear_names() -> None:
    texts = [text.get_text() for text in frontier_plot(SYSTEMS, "conrec", {}, ["most shown"]).axes[0].texts]
    assert texts == [" FHR = FPH", "1 most shown", "3", "4", "5", "6 conrec"]


def test_frontier_lines_leave_a_gap_and_tell_ours_from_a_floor_s() -> None:
    axes = frontier_plot(SYSTEMS, "conrec", LINES).axes[0]
    line = curve(axes, "floor")
    np.testing.assert_allclose(line.get_xydata(), [[0.18, 0.2], [0.1, np.nan], [0.05, 0.1]])
    assert line.get_color() == GREY
    contrast, gamma = curve(axes, "conrec, by contrast"), curve(axes, "conrec, by gamma")
    assert contrast.get_color() == gamma.get_color() == ORANGE
    assert contrast.get_linestyle() != gamma.get_linestyle()
    assert axes.get_ylim()[1] > 0.35, "a line may reach beyond the systems"


def test_a_line_belongs_to_the_system_that_it_names() -> None:
    assert group_of("floor", [], SYSTEMS) == "floor"
    assert group_of("by exponent", [point("TIGER", 0.1, 0.1)], SYSTEMS) == "generative"
    assert group_of("by contrast", [point("0.5", 0.1, 0.1)], SYSTEMS) == "ours"


def comparison(value: float | None, low: float | None, high: float | None) -> dict[str, Any]:
    return {"ratio": {"value": value, "low": low, "high": high}}


def test_ratios_stand_hardest_first_and_say_what_is_beyond_chance() -> None:
    given = {
        "easy": comparison(2.0, 1.8, 2.2),
        "lost": comparison(0.8, 0.7, 0.9),
        "even": comparison(1.1, 0.95, 1.3),
        "catches nothing": comparison(None, None, None),
    }
    axes = ratio_plot(given, "ratio", 1.15).axes[0]
    assert dots(axes) == {(0.8, 0): BLUE, (1.1, -1): GREY, (2.0, -2): ORANGE}
    words = [text.get_text() for text in axes.texts]
    assert words[:6] == ["lost", "0.80  [0.70, 0.90]", "even", "1.10  [0.95, 1.30]", "easy", "2.00  [1.80, 2.20]"]
    spans = [line.get_xdata() for line in axes.get_lines()]
    assert [0.7, 0.9] in [list(span) for span in spans]
    assert [list(span) for span in spans].count([1, 1]) == [list(span) for span in spans].count([1.15, 1.15]) == 3
    low, high = axes.get_xlim()
    assert low < 0.7 and high > 2.2
    assert axes.get_xscale() == "log"


@pytest.mark.parametrize("value", [1000.0, None])
def test_a_system_that_is_beaten_without_measure_does_not_hide_the_others(value: float | None) -> None:
    high = None if value is None else 2 * value
    axes = ratio_plot(
        {"nothing": comparison(value, 1.2, high), "close": comparison(1.1, 1.0, 1.2)}, "ratio", 1.15
    ).axes[0]
    assert axes.get_xlim()[1] < 20


def test_ablation_draws_both_differences_of_each_step() -> None:
    steps = [
        {
            "step": "+ alignment",
            "against": "translation",
            "differences": {"FHR": interval(0.02), "FPH": interval(-0.01)},
        },
        {"step": "+ penalty", "against": "+ alignment", "differences": {"FHR": interval(0.0)}},
    ]
    axes = ablation_plot(steps).axes[0]
    drawn = {place: colour for place, colour in dots(axes).items() if not np.isnan(place).any()}
    assert drawn == {(0.02, 0.02): ORANGE, (0.0, -0.98): ORANGE, (-0.01, -0.2): BLUE}
    words = [text.get_text() for text in axes.texts]
    assert words == ["+ alignment", "against translation", "+ penalty", "against + alignment"]


def test_catch_curves_are_ordered_at_the_limit_and_cut_at_five_percent() -> None:
    curves = {
        "late": {"false_block": [0.0, 0.01, 0.05, 0.1], "catch": [0.0, 0.1, 0.9, 1.0]},
        "conrec": {"false_block": [0.0, 0.01, 0.05, 0.1], "catch": [0.0, 0.3, None, 0.6]},
        "early": {"false_block": [0.0, 0.01, 0.05, 0.1], "catch": [0.0, 0.2, 0.3, 0.4]},
    }
    figure = catch_plot(curves, "conrec")
    axes = figure.axes[0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["conrec", "early", "late"]
    assert curve(axes, "conrec").get_color() == ORANGE
    np.testing.assert_allclose(curve(axes, "conrec").get_ydata(), [0, 0.3, np.nan, 0.6])
    assert axes.get_xlim() == (0, 0.05)
    assert axes.get_ylim()[1] == pytest.approx(0.9 * 1.08), "what lies beyond the border does not stretch the scale"
    assert [0.01, 0.01] in [list(line.get_xdata()) for line in axes.get_lines()]


def test_many_catch_curves_are_all_told_apart() -> None:
    curves = {str(number): {"false_block": [0.0, 0.05], "catch": [0.0, number / 20]} for number in range(12)}
    lines = [curve(catch_plot(curves, "0").axes[0], name) for name in curves]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12


def published(**curves: tuple[list[float | None], float]) -> dict[str, Any]:
    """Each system with its curve over false blocks of 0, 5, 10 and 15 %, and what its list does at alpha .05."""
    grid = [0.0, 0.05, 0.1, 0.15]
    return {
        "alpha": 0.05,
        "curves": {
            name: {
                "false_block": grid,
                "value": values,
                "low": [None if value is None else value - 0.02 for value in values],
                "high": [None if value is None else value + 0.02 for value in values],
            }
            for name, (values, _) in curves.items()
        },
        "systems": {
            name: {
                "at_alpha": {
                    "0.01": {"false_block": interval(None), "catch": interval(None)},
                    "0.05": {"false_block": interval(0.06), "catch": interval(caught)},
                    "0.1": {"false_block": interval(0.12), "catch": interval(caught + 0.1)},
                }
            }
            for name, (_, caught) in curves.items()
        },
    }


def test_published_curves_have_bands_a_diagonal_and_the_promises_of_ours_alone() -> None:
    given = published(late=([0, 0.1, 0.6, None], 0.1), ours=([0, 0.3, 0.4, 0.5], 0.31), early=([0, 0.2, 0.3, 0.4], 0.2))
    figure = published_plot(given, "ours")
    axes = figure.axes[0]
    # Where ours is served, at 6 %, curves count up to 5 %.
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ours", "early", "late"]
    assert curve(axes, "ours").get_color() == ORANGE
    np.testing.assert_allclose(curve(axes, "late").get_ydata(), [0, 0.1, 0.6, np.nan])
    diagonals = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert len(diagonals) == 1 and np.ptp(np.subtract(*diagonals[0].get_data())) == 0
    bands = {to_hex(band.get_facecolor()[0]): band for band in axes.collections if isinstance(band, PolyCollection)}
    assert len(bands) == 3
    corners = bands[ORANGE].get_paths()[0].vertices
    assert corners[:, 1].min() == pytest.approx(-0.02) and corners[:, 1].max() == pytest.approx(0.52)
    (points,) = (each for each in axes.collections if isinstance(each, PathCollection))
    np.testing.assert_allclose(points.get_offsets(), [[0.06, 0.31], [0.12, 0.41]])
    said = {text.get_text(): text.get_fontweight() for text in axes.texts}
    assert (said["α .05"], said["α .1"]) == ("bold", "normal")
    assert "α .01" not in said, "no threshold, no point"
    assert axes.get_xlim() == (0, 0.15)
    assert axes.get_ylim()[1] == pytest.approx(0.62 * 1.06), "bands and points are not cut off"


def test_lists_that_hold_nothing_are_an_empty_picture() -> None:
    given = published(ours=([None] * 4, 0.0))
    for lists in given["systems"]["ours"]["at_alpha"].values():
        lists |= {"false_block": interval(None), "catch": interval(None)}
    assert published_plot(given, "ours").axes[0].get_xlim()[0] == 0


def bars(figure: Figure) -> list[dict[tuple[float, str], float]]:
    """For each panel: (row, colour) -> length."""
    return [
        {
            (round(bar.get_y() + bar.get_height() / 2), to_hex(bar.get_facecolor())): bar.get_width()
            for bar in axes.patches
            if not np.isnan(bar.get_width())
        }
        for axes in figure.axes
    ]


def test_responsiveness_draws_the_three_shares_of_each_group_and_nothing_else() -> None:
    answers = {
        "rejected": {
            "same code": {
                "newly blocked": interval(0.2),
                "blocked before": interval(0.05),
                "relative change": interval(0.4),
            },
            "counts": {"items": interval(3.0)},
        },
        "liked": {
            "same code": {"newly unblocked": interval(0.1)},
            "liked later": {"newly blocked": interval(0.02), "newly unblocked": interval(None)},
        },
    }
    figure = responsiveness_plot(answers)
    assert bars(figure) == [{(0, ORANGE): 0.2, (0, GREY): 0.05}, {(0, BLUE): 0.1, (1, ORANGE): 0.02}]
    assert [axes.get_title() for axes in figure.axes] == ["after one more item rejected", "after one more item liked"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["same code", "liked later"]


def test_forgetting_follows_the_phases_in_their_order() -> None:
    given = {"conrec": {"alignment": 0.7, "warm_up": 0.6, "all": 0.5}, "other": {"alignment": 0.7, "all": None}}
    axes = forgetting_plot(given, "conrec").axes[0]
    assert curve(axes, "conrec").get_xydata().tolist() == [[0, 0.7], [1, 0.6], [2, 0.5]]
    np.testing.assert_allclose(curve(axes, "other").get_xydata(), [[0, 0.7], [2, np.nan]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["alignment", "warm\nup", "all"]


def test_the_verdict_is_drawn_over_chance() -> None:
    axes = verdict_plot({"conrec": {"warm_up": 0.68, "all": 0.67}, "other": {"all": None}}, "conrec").axes[0]
    assert curve(axes, "conrec").get_xydata().tolist() == [[0, 0.68], [1, 0.67]]
    (chance,) = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
    assert set(chance.get_ydata()) == {0.5}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["warm\nup", "all"]


@pytest.mark.parametrize("systems", [{}, {"a": system("floor", None, None)}])
def test_without_any_figure_there_is_an_empty_picture(systems: dict[str, Any]) -> None:
    assert frontier_plot(systems, "conrec", {}).axes[0].get_xlim()[0] == 0
