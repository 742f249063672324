"""The pictures of a run: systems between harm and catch, the course of training, theta.

    figure = frontier_plot(systems, ours=["conrec"], frontiers={"exposure x rejection rate": [...]})
    html = svg(figure)
    plot_training(rows_of_metrics_jsonl, "runs/kuairand/policy/1a2b3c4d5e6f/training.png")

Invariant: a plot is a function of plain dictionaries as they stand in metrics.json and metrics.jsonl, so every
picture can be drawn again from the files alone; what is missing there leaves a gap, never an invented value.
Lines and text take the reader's text colour in the SVG form, which makes one picture fit light and dark pages.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from conrec import storage

Figures = Mapping[str, Mapping[str, float | None]]
"""measure -> value, low, high."""
Rows = Sequence[Mapping[str, Any]]
"""Rows of metrics.jsonl: `phase`, `step` within it, and figures."""

Panels = Sequence[tuple[str, Mapping[str, tuple[str, str]]]]
"""Title, and key of a row -> label, colour."""

OURS, FLOOR, SECOND, THIRD = "#d55e00", "#0072b2", "#009e73", "#cc79a7"
"""Colours that the colour-blind tell apart (Okabe and Ito), readable on white and on black."""
# Replaced by `currentColor` in SVG; nearly black, for PNG on white.
_INK = "#010203"
# In inches: on a phone one point of text is then about one pixel.
_WIDTH = 5.4
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "conrec",
    "figure.constrained_layout.use": True,
} | dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)

_SPEED = ("tokens per second", {"tokens_per_second": ("tokens per second", FLOOR)})
_SUPERVISED: Panels = (
    ("cross-entropy", {"loss": ("loss", OURS)}),
    ("held-out alignment questions answered right", {"alignment_accuracy": ("accuracy", SECOND)}),
    _SPEED,
)
_GRPO: Panels = (
    (
        "reward and its two terms",
        {
            "reward": ("reward", OURS),
            "reward_gain": ("+ rejections", SECOND),
            "reward_penalty": ("- likes", FLOOR),
        },
    ),
    ("KL divergence to the start of the stage", {"kl": ("KL", OURS)}),
    ("validation anchors", {"validation_fhr": ("FHR", OURS), "validation_fph": ("FPH", FLOOR)}),
    ("entropy per semantic ID, nats", {"entropy": ("entropy", OURS)}),
    (
        "share of groups with",
        {
            "groups_without_variance": ("equal rewards", OURS),
            "most_frequent_share": ("the commonest ID", FLOOR),
        },
    ),
    ("held-out alignment questions answered right", {"alignment_accuracy": ("accuracy", SECOND)}),
    _SPEED,
)


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element that scales to its container and takes the page's text colour."""
    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor").strip()


def png(figure: Figure) -> bytes:
    """The figure as a PNG on white."""
    buffer = io.BytesIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()


def plot_training(rows: Rows, url: str) -> None:
    """Writes one PNG: the supervised phases on the left, the GRPO stages on the right, as far as there are any."""
    parts = _parts(rows)
    with rc_context(_STYLE):
        tallest = max((len(panels) for _, panels in parts.values()), default=1)
        figure = Figure(figsize=(_WIDTH * max(len(parts), 1), 0.6 + 1.45 * tallest))
        halves = figure.subfigures(1, max(len(parts), 1), squeeze=False)[0]
        for half, (part, panels) in zip(halves, parts.values(), strict=False):
            _panels(half, part, panels)
    storage.write_bytes(url, png(figure))


def training_plots(rows: Rows) -> dict[str, Figure]:
    """The plots of the supervised phases and of the GRPO stages, by name; an empty part is left out."""
    figures = {}
    with rc_context(_STYLE):
        for name, (part, panels) in _parts(rows).items():
            figures[name] = Figure(figsize=(_WIDTH, 0.6 + 1.45 * len(panels)))
            _panels(figures[name], part, panels)
    return figures


def _parts(rows: Rows) -> dict[str, tuple[Rows, Panels]]:
    """`supervised` and `grpo`: their rows, and those of their panels that the rows have figures for."""
    stages = {row["phase"] for row in rows if "reward" in row}
    parts: dict[str, tuple[Rows, Panels]] = {}
    for name, panels in (("supervised", _SUPERVISED), ("grpo", _GRPO)):
        part = [row for row in rows if (row["phase"] in stages) == (name == "grpo")]
        drawn = [(title, keys) for title, keys in panels if any(key in row for row in part for key in keys)]
        if drawn:
            parts[name] = (part, drawn)
    return parts


def frontier_plot(
    systems: Mapping[str, Figures], ours: Sequence[str], frontiers: Mapping[str, Sequence[str]]
) -> Figure:
    """FHR against FPH with 95 % intervals; a system bears its number in the order of `systems`, from 1.

    `frontiers` names lines: the systems on each, in the order of what is traded. Above the dashed line a list
    catches rejections more often than it costs likes.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 4.8))
        axes = figure.add_subplot()
        places = {}
        for name, figures in systems.items():
            x, y = figures["FPH"]["value"], figures["FHR"]["value"]
            if x is not None and y is not None:
                places[name] = (x, y)
        end = max((max(place) for place in places.values()), default=1.0) * 1.12
        axes.plot([0, end], [0, end], linestyle="--", linewidth=0.8, color=_INK, alpha=0.5, label="FHR = FPH")
        for line, (name, members) in enumerate(frontiers.items()):
            colour = OURS if any(member in ours for member in members) else (FLOOR, SECOND, THIRD)[line % 3]
            known = np.array([places[member] for member in members if member in places]).reshape(-1, 2)
            axes.plot(*known.T, color=colour, linewidth=1.4, label=name, zorder=2)
        for name, (x, y) in places.items():
            colour, size = (OURS, 42) if name in ours else (FLOOR, 18)
            harm, catch = systems[name]["FPH"], systems[name]["FHR"]
            # None, for an interval nobody could compute, is drawn as NaN is: not at all.
            across, along = np.array([[harm["low"], harm["high"]], [catch["low"], catch["high"]]], float)
            axes.plot(across, [y, y], color=colour, linewidth=0.8, alpha=0.45)
            axes.plot([x, x], along, color=colour, linewidth=0.8, alpha=0.45)
            axes.scatter(x, y, s=size, color=colour, zorder=3)
        axes.set(xlim=(0, end), ylim=(0, end), aspect="equal")
        axes.set(xlabel="FPH: lists that cost a later like", ylabel="FHR: lists that catch a later rejection")
        axes.legend(frameon=False, loc="lower right", fontsize=8)
        _number(figure, axes, {str(place): places[name] for place, name in enumerate(systems, 1) if name in places})
    return figure


def calibration_plot(curve: Mapping[str, Sequence[float]], theta: float | None, alpha: float) -> Figure:
    """false_block and catch over theta on a logarithmic scale, with the calibrated theta and the promise alpha.

    `curve` holds `theta`, `false_block` and `catch`, of one length.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.4))
        axes = figure.add_subplot()
        thetas = np.asarray(curve["theta"], float)
        for key, label, colour in (("catch", "catch", OURS), ("false_block", "false block", FLOOR)):
            shares = np.array([np.nan if share is None else share for share in curve[key]], float)
            axes.plot(thetas, np.where(shares > 0, shares, np.nan), color=colour, label=label)
        axes.axhline(alpha, linestyle=":", linewidth=1, color=FLOOR)
        axes.annotate(f"alpha = {alpha:g}", (0.01, alpha), xycoords=("axes fraction", "data"), va="bottom", color=FLOOR)
        if theta is not None:
            axes.axvline(theta, linestyle="--", linewidth=1, color=_INK)
            axes.annotate(f" theta = {theta:.3f}", (theta, 1), xycoords=("data", "axes fraction"), va="top")
        axes.set(yscale="log", xlabel="theta: smallest similarity that is blocked", ylabel="share of items blocked")
        axes.legend(frameon=False)
    return figure


def _panels(figure: FigureBase, rows: Rows, panels: Panels) -> None:
    """Panels above one another over the steps of all phases, a vertical line and a name where a phase starts."""
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    lengths = {
        phase: max((row["step"] for row in rows if row["phase"] == phase and "loss" in row), default=0)
        for phase in phases
    }
    starts = dict(zip(phases, np.cumsum([0, *lengths.values()]).tolist(), strict=False))
    total = sum(lengths.values())
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, keys) in zip(grid, panels, strict=True):
        for key, (label, colour) in keys.items():
            points = _course(rows, starts, lengths, key)
            marker = "o" if len(points) < total / 4 else None
            axes.plot(*points.T, color=colour, label=label, linewidth=1.2, marker=marker, markersize=3.5)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.ticklabel_format(axis="y", useOffset=False)
        if len(keys) > 1:
            above = {"loc": "lower right", "bbox_to_anchor": (1, 0.97), "borderpad": 0}
            axes.legend(frameon=False, fontsize=8, ncols=len(keys), **above)
        for phase in phases[1:]:
            axes.axvline(starts[phase], linewidth=0.8, linestyle=":", color=_INK, alpha=0.6)
    rejected = {row["phase"] for row in rows if not row.get("stage_accepted", True)}
    # Below the axis on two lines, since the names of short phases would write over one another.
    below = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top", "fontsize": 8}
    for number, phase in enumerate(phases):
        name = f"| {phase}, rejected" if phase in rejected else f"| {phase}"
        grid[-1].annotate(name, (starts[phase], 0), (0, -18 - 12 * (number % 2)), **below)
    grid[-1].annotate("step", (max(total, 1), 0), (0, -18), ha="right", **below)
    grid[-1].set_xlim(0, max(total, 1))


def _course(rows: Rows, starts: Mapping[str, int], lengths: Mapping[str, int], key: str) -> np.ndarray:
    """(step over all phases, value) of every row that has the key; a stage's start counts as a measurement."""
    before = key.replace("validation_", "before_")
    points = []
    for row in rows:
        if key in row:
            # What is measured after a phase's last step belongs to its end, not to the next phase.
            points.append((starts[row["phase"]] + min(row["step"], lengths[row["phase"]]), row[key]))
        elif before in row:
            points.append((starts[row["phase"]], row[before]))
    return np.array(sorted(points, key=lambda point: point[0]), float).reshape(-1, 2)


def _number(figure: Figure, axes: Axes, places: Mapping[str, tuple[float, float]]) -> None:
    """Writes each label beside its point, at the first of several places around it that no other label takes."""
    figure.draw_without_rendering()
    points = {name: axes.transData.transform(place) * 72 / figure.dpi for name, place in places.items()}
    taken = list(points.values())
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False) + np.pi / 2
    ring = np.array([(np.cos(angle), np.sin(angle)) for angle in angles])
    offsets = np.concatenate([distance * ring for distance in (9, 16, 24)])
    for name, centre in points.items():
        others = np.array([other for other in taken if other is not centre]).reshape(-1, 2)
        gaps = (centre + offsets)[:, None] - others
        clear = np.hypot(gaps[..., 0], gaps[..., 1]).min(axis=1, initial=99)
        best = int(np.argmax(clear > 8)) if (clear > 8).any() else int(np.argmax(clear))
        taken.append(centre + offsets[best])
        axes.annotate(
            name,
            places[name],
            tuple(offsets[best]),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": _INK, "shrinkA": 4, "shrinkB": 2},
        )
