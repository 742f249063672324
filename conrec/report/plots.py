"""The pictures of an evaluation: the published lists, systems between harm and catch, steps, response, forgetting.

    figure = frontier_plot(document["systems"], document["ours"], document["lines"])
    html = svg(figure)

Invariant: a plot is a function of plain dictionaries as they stand in metrics.json, so every picture can be drawn
again from that file alone; what is missing or None there leaves a gap, never an invented value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from conrec.evaluation.document import Line
from conrec.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PINK,
    VIOLET,
    WIDTH,
    ends,
    label_points,
    numbers,
    style,
)
from conrec.report.words import alpha_words

COLOURS = {
    "floor": GREY,
    "outside": VIOLET,
    "sequential": BLUE,
    "generative": GREEN,
    "ablation": PINK,
    "ours": ORANGE,
}
"""Group of systems -> its colour in every picture and table."""
NAMES = {
    "floor": "floors",
    "outside": "systems from outside",
    "sequential": "sequential models on item IDs",
    "generative": "generative models on semantic IDs",
    "ablation": "the full method without some steps",
    "ours": "the full method",
}
"""Group -> what it is called, in the order of the key."""

BARS = {"newly blocked": ORANGE, "newly unblocked": BLUE, "blocked before": GREY}
"""Shares of the answer to one more event that are drawn."""

# Of lines whose colour says nothing but `another one`.
_OTHERS = (BLUE, GREEN, PINK, GREY)
_DASHES = ("-", "--", ":", "-.")
# Inches for a row of words with what is drawn below them.
_ROW = 0.4


def published_plot(published: Mapping[str, Any], ours: str) -> Figure:
    """Catch against false block of every system's published lists with 95 % bands; ours with its calibrated alphas.

    Shape: published: `curves`: system -> `false_block`, `value`, `low`, `high`, of one length, and `systems`. On the
    dashed diagonal lies a list that is drawn by chance. The legend stands in the order of the curves where ours is
    served.
    """
    curves, others = published["curves"], [name for name in published["curves"] if name != ours]
    at_alpha = published["systems"][ours]["at_alpha"]
    served = ends(at_alpha.get(f"{published['alpha']:g}", {}).get("false_block"))[0]

    def height(name: str) -> float:
        x, y = numbers(curves[name]["false_block"]), numbers(curves[name]["value"])
        return float(np.nanmax(y[x <= np.nan_to_num(served, nan=np.inf)], initial=-1))

    with style():
        figure = Figure(figsize=(WIDTH, 4.8))
        axes = figure.add_subplot()
        colours = {name: _OTHERS[place % len(_OTHERS)] for place, name in enumerate(others)} | {ours: ORANGE}
        drawn = [np.zeros((1, 2))]
        for name in sorted(curves, key=height, reverse=True):
            x, low, high, y = (numbers(curves[name][key]) for key in ("false_block", "low", "high", "value"))
            above = 4 if name == ours else 2
            axes.fill_between(x, low, high, color=colours[name], alpha=0.16, linewidth=0, zorder=above - 1)
            axes.plot(x, y, color=colours[name], linewidth=2.2 if name == ours else 1.3, zorder=above, label=name)
            drawn += [np.stack([x, np.fmax(y, high)], axis=1)]
        places = {alpha: (ends(lists["false_block"])[0], ends(lists["catch"])[0]) for alpha, lists in at_alpha.items()}
        places = {alpha: place for alpha, place in places.items() if not np.isnan(place).any()}
        dots = np.reshape(list(places.values()), (-1, 2))
        drawn.append(dots)
        axes.scatter(dots[:, 0], dots[:, 1], s=34, color=ORANGE, edgecolor=INK, linewidth=0.7, zorder=6)
        right, top = np.nanmax(np.concatenate(drawn), axis=0, initial=1e-3) * [1.0, 1.06]
        end = min(right, top)
        axes.plot([0, end], [0, end], "--", linewidth=0.9, color=INK, alpha=0.6, zorder=1)
        axes.annotate(" by chance", (0.62 * end, 0.62 * end), va="top", fontsize=8, alpha=0.8)
        axes.set(xlim=(0, right), ylim=(0, top))
        percent = FuncFormatter(lambda value, _: f"{100 * value:g} %")
        axes.xaxis.set_major_formatter(percent)
        axes.yaxis.set_major_formatter(percent)
        axes.set(xlabel="false block: later likes that are lost", ylabel="catch: later rejections that are spared")
        figure.legend(loc="outside lower center", ncols=1 if max(map(len, curves), default=0) > 34 else 2, fontsize=8)
        _label_alphas(figure, axes, places, published["alpha"])
    return figure


def _label_alphas(figure: Figure, axes: Axes, places: Mapping[str, tuple[float, float]], served: float) -> None:
    """Above our curve, which bends that way from its points; below it where the axis leaves no room."""
    figure.draw_without_rendering()
    left = axes.get_window_extent().x0
    for alpha, place in places.items():
        room = (axes.transData.transform(place)[0] - left) * 72 / figure.dpi > 34
        axes.annotate(
            alpha_words(alpha).replace("alpha", "α"),
            place,
            (-6, 5) if room else (8, -3),
            textcoords="offset points",
            ha="right" if room else "left",
            va="bottom" if room else "top",
            fontsize=8,
            fontweight="bold" if float(alpha) == served else "normal",
            zorder=7,
        )


def frontier_plot(
    systems: Mapping[str, Mapping[str, Any]], ours: str, lines: Mapping[str, Line], named: Sequence[str] = ()
) -> Figure:
    """FHR against FPH with 95 % intervals; a system bears its number in the order of `systems`, from 1.

    Shape: systems: name -> {"group", "figures"}; `named` are written out beside their numbers. Above the dashed line
    a list catches rejections more often than it costs likes.
    """
    with style():
        figure = Figure(figsize=(WIDTH, 5.2))
        axes = figure.add_subplot()
        points = {name: (ends(s["figures"].get("FPH")), ends(s["figures"].get("FHR"))) for name, s in systems.items()}
        points = {name: point for name, point in points.items() if not np.isnan([point[0][0], point[1][0]]).any()}
        drawn = [(across[0], along[0]) for across, along in points.values()]
        groups = [group_of(name, line, systems) for name, line in lines.items()]
        for place, (name, line) in enumerate(lines.items()):
            colour = COLOURS[groups[place]]
            corners = np.array([(ends(point["FPH"])[0], ends(point["FHR"])[0]) for point in line]).reshape(-1, 2)
            # Two lines of one colour differ in their dashes.
            dash = _DASHES[groups[:place].count(groups[place]) % len(_DASHES)]
            width = 1.8 if colour == ORANGE else 1.1
            axes.plot(*corners.T, dash, color=colour, linewidth=width, marker=".", markersize=4, zorder=4, label=name)
            drawn += corners[~np.isnan(corners).any(axis=1)].tolist()
        for name, (across, along) in points.items():
            group = "ours" if name == ours else systems[name]["group"]
            colour = COLOURS[group]
            axes.plot(across[1:], [along[0]] * 2, color=colour, linewidth=0.8, alpha=0.5, zorder=2)
            axes.plot([across[0]] * 2, along[1:], color=colour, linewidth=0.8, alpha=0.5, zorder=2)
            axes.scatter(across[0], along[0], s=48 if name == ours else 18, color=colour, zorder=5)
        right, top = np.max(np.reshape(drawn, (-1, 2)), axis=0, initial=1e-3) * 1.12
        end = min(right, top)
        axes.plot([0, end], [0, end], "--", linewidth=0.8, color=INK, alpha=0.5)
        # Few lists cost a like more often than they catch: there is room under the line.
        axes.annotate(" FHR = FPH", (0.45 * end, 0.45 * end), va="top", fontsize=8, alpha=0.7)
        axes.set(xlim=(0, right), ylim=(0, top))
        axes.set(xlabel="FPH: lists that cost a later like", ylabel="FHR: lists that catch a later rejection")
        if lines:
            figure.legend(loc="outside lower center", ncols=1, fontsize=8)
        places = {
            f"{place} {name}" if name in (ours, *named) else str(place): (points[name][0][0], points[name][1][0])
            for place, name in enumerate(systems, 1)
            if name in points
        }
        label_points(figure, axes, places, next((label for label in places if label.endswith(f" {ours}")), None))
    return figure


def group_of(name: str, line: Line, systems: Mapping[str, Mapping[str, Any]]) -> str:
    """The group of a frontier's line: of the system that one of its points or its name's beginning names, else ours."""
    labels = {point["label"] for point in line}
    found = [s["group"] for other, s in systems.items() if other in labels or other.startswith(name)]
    return found[0] if found else "ours"


def ratio_plot(comparisons: Mapping[str, Mapping[str, Any]], key: str, target: float) -> Figure:
    """One line a system: ours / theirs with its interval on a logarithmic scale, the hardest to beat on top.

    `key` names the figure in each comparison; a system without it is not drawn. Marked are 1, as good as theirs, and
    the target. Orange: ours catches more beyond chance, blue: theirs does, grey: neither.
    """
    known = {name: ends(comparison.get(key)) for name, comparison in comparisons.items()}
    known = {name: figure for name, figure in known.items() if figure[0] > 0}
    order = sorted(known, key=lambda name: known[name][0])
    with style():
        figure, axes = _rows([(name, _ratio_text(known[name])) for name in order])
        for row, name in enumerate(order):
            value, low, high = known[name]
            # Grey where chance alone could have made the difference.
            colour = ORANGE if low > 1 else BLUE if high < 1 else GREY
            axes.plot([low, high], [-row, -row], color=colour, linewidth=1.6, alpha=0.6)
            axes.scatter(value, -row, s=24, color=colour, zorder=3)
        # A system that hits next to nothing is beaten without measure: the scale is for those that are close.
        seen = numbers([end for name in order for end in known[name]])
        least = np.nanmin(seen, initial=0.9)
        axes.set_xscale("log")
        axes.set_xlim(max(least, 0.2) * 0.95, min(max(np.nanmax(seen, initial=target), target) * 1.08, 12))
        _mark(axes, len(order), 1)
        _mark(axes, len(order), target, linestyle=":")
        for place, text in ((1, "1 "), (target, f" {target:g}")):
            axes.annotate(
                text,
                (place, 1),
                xycoords=("data", "axes fraction"),
                va="bottom",
                ha="right" if place == 1 else "left",
                fontsize=8,
            )
        ticks = [0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10]
        axes.xaxis.set_major_locator(NullLocator())
        axes.xaxis.set_minor_locator(NullLocator())
        low, high = axes.get_xlim()
        axes.set_xticks([tick for tick in ticks if low <= tick <= high])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("ours / theirs")
    return figure


def ablation_plot(steps: Sequence[Mapping[str, Any]]) -> Figure:
    """One line a step: what it adds to FHR and to FPH over what it is measured against, with 95 % intervals."""
    with style():
        figure, axes = _rows([(f"{step['step']}", f"against {step['against']}") for step in steps])
        for measure, colour, offset in (("FHR", ORANGE, 0.02), ("FPH", BLUE, -0.2)):
            points = np.array([ends(step["differences"].get(measure)) for step in steps]).reshape(-1, 3)
            rows = offset - np.arange(len(steps))
            axes.plot(points[:, 1:].T, [rows, rows], color=colour, linewidth=1.6, alpha=0.6)
            axes.scatter(points[:, 0], rows, s=22, color=colour, zorder=3, label=measure)
        _mark(axes, len(steps), 0)
        axes.set_xlabel("difference in the share of lists")
        figure.legend(loc="outside lower right", ncols=2, fontsize=8)
    return figure


def catch_plot(curves: Mapping[str, Mapping[str, Sequence[float | None]]], ours: str, limit: float = 0.01) -> Figure:
    """Share of future rejections blocked against the share of future likes blocked, up to 5 %; `limit` is marked.

    Shape: curves: system -> `false_block` and `catch`, of one length. The legend stands in the order of the curves at
    the limit.
    """

    def at_limit(name: str) -> float:
        catch = numbers(curves[name]["catch"])[numbers(curves[name]["false_block"]) <= limit]
        return float(np.nanmax(catch, initial=-1))

    with style():
        figure = Figure(figsize=(WIDTH, 4.4))
        axes = figure.add_subplot()
        others = [name for name in curves if name != ours]
        colours = {name: _OTHERS[place % len(_OTHERS)] for place, name in enumerate(others)} | {ours: ORANGE}
        top = 0.0
        for name in sorted(curves, key=at_limit, reverse=True):
            x, y = numbers(curves[name]["false_block"]), numbers(curves[name]["catch"])
            dash = "-" if name == ours else _DASHES[1:][others.index(name) // len(_OTHERS) % 3]
            if name != ours and others.index(name) < len(_OTHERS):
                dash = "-"
            width, above = (2.2, 4) if name == ours else (1.2, 2)
            axes.plot(x, y, color=colours[name], linestyle=dash, label=name, linewidth=width, zorder=above)
            top = max(top, float(np.nanmax(y[x <= 0.05], initial=0)))
        axes.axvline(limit, linestyle="--", linewidth=0.8, color=INK)
        axes.set(xlim=(0, 0.05), ylim=(0, max(top, 1e-3) * 1.08))
        percent = FuncFormatter(lambda value, _: f"{100 * value:g} %")
        axes.xaxis.set_major_formatter(percent)
        axes.yaxis.set_major_formatter(percent)
        axes.set(xlabel="false block: later likes that are blocked", ylabel="catch: later rejections that are blocked")
        figure.legend(loc="outside lower center", ncols=1 if max(map(len, curves), default=0) > 34 else 2, fontsize=8)
    return figure


def responsiveness_plot(answers: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Bars with intervals, one panel an extra event: what is newly blocked, newly unblocked, and was blocked before.

    Shape: answers: event -> group of items (`same code`, ...) -> share of BARS -> figure; other entries are not drawn.
    """
    panels = {
        event: {group: shares for group, shares in answer.items() if BARS.keys() & shares.keys()}
        for event, answer in answers.items()
    }
    groups = list(dict.fromkeys(group for panel in panels.values() for group in panel))
    with style():
        figure = Figure(figsize=(WIDTH, 0.9 + (0.4 + 0.62 * len(groups)) * len(panels)))
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (event, panel) in zip(grid, panels.items(), strict=True):
            for place, (bar, colour) in enumerate(BARS.items()):
                rows = np.arange(len(groups)) + 0.27 * (place - 1)
                points = np.array([ends(panel.get(group, {}).get(bar)) for group in groups])
                axes.barh(rows, points[:, 0], height=0.23, color=colour, label=bar)
                axes.plot(points[:, 1:].T, [rows, rows], color=INK, linewidth=1)
            axes.set_yticks(range(len(groups)), groups)
            axes.set(ylim=(len(groups) - 0.4, -0.6), title=f"after one more item {event}")
            axes.title.set(ha="left", fontweight="bold", x=0)
            axes.tick_params(axis="y", length=0)
        grid[-1].set_xlim(0, None)
        grid[-1].set_xlabel("share of these items")
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def forgetting_plot(accuracies: Mapping[str, Mapping[str, float | None]], ours: str) -> Figure:
    """Accuracy on held-out alignment questions after each phase, one line a system."""
    figure, axes = _after_phases(accuracies, ours)
    axes.set(ylim=(0, None), ylabel="questions answered right")
    return figure


def verdict_plot(aucs: Mapping[str, Mapping[str, float | None]], ours: str) -> Figure:
    """AUC of the verdict after each phase, one line a system; chance is dotted."""
    figure, axes = _after_phases(aucs, ours)
    axes.axhline(0.5, linewidth=0.9, linestyle=":", color=INK)
    axes.set_ylabel("AUC, rejections from likes")
    return figure


def _after_phases(courses: Mapping[str, Mapping[str, float | None]], ours: str) -> tuple[Figure, Axes]:
    phases = list(dict.fromkeys(phase for course in courses.values() for phase in course))
    others = [name for name in courses if name != ours]
    with style():
        figure = Figure(figsize=(WIDTH, 3.4))
        axes = figure.add_subplot()
        for name, course in courses.items():
            colour = ORANGE if name == ours else _OTHERS[others.index(name) % len(_OTHERS)]
            places = [phases.index(phase) for phase in course]
            axes.plot(places, numbers(course.values()), color=colour, marker="o", markersize=4, label=name)
        axes.set_xticks(range(len(phases)), [phase.replace("_", "\n") for phase in phases])
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure, axes


def _rows(labels: Sequence[tuple[str, str]]) -> tuple[Figure, Axes]:
    """Axes with one row a label, from y = 0 downwards; name and remark stand above what is drawn, over the width."""
    figure = Figure(figsize=(WIDTH, 0.9 + _ROW * len(labels)))
    axes = figure.add_subplot()
    axes.set(ylim=(0.5 - len(labels), 0.7), yticks=[])
    axes.spines["left"].set_visible(False)
    for row, (name, remark) in enumerate(labels):
        for place, text, side in ((0, name, "left"), (1, remark, "right")):
            axes.annotate(
                text, (place, 0.36 - row), xycoords=("axes fraction", "data"), ha=side, va="center", fontsize=8
            )
    return figure, axes


def _mark(axes: Axes, rows: int, place: float, linestyle: str = "-") -> None:
    """A vertical line that leaves out the words of the rows."""
    for row in range(rows):
        axes.plot([place] * 2, [0.14 - row, -0.32 - row], color=INK, linewidth=0.9, linestyle=linestyle, zorder=1)


def _ratio_text(figure: tuple[float, float, float]) -> str:
    value, low, high = figure
    interval = "" if np.isnan([low, high]).any() else f"  [{low:.2f}, {high:.2f}]"
    return f"{value:.2f}{interval}"
