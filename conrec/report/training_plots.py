"""The course of a training run: loss, reward, validation figures, speed.

    plot_training(rows_of_metrics_jsonl, "runs/kuairand/policy/1a2b3c4d5e6f/training.png")
    figures = training_plots(rows_of_metrics_jsonl)

Invariant: a plot is a function of the rows as they stand in metrics.jsonl, so every picture can be drawn again from
that file alone; what is missing there leaves a gap, never an invented value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure, FigureBase

from conrec import storage
from conrec.report.drawing import BLUE, GREEN, INK, ORANGE, WIDTH, png, style

Rows = Sequence[Mapping[str, Any]]
"""Rows of metrics.jsonl: `phase`, `step` within it, and figures."""

Panels = Sequence[tuple[str, Mapping[str, tuple[str, str]]]]
"""Title, and key of a row -> label, colour."""

_SPEED = ("tokens per second", {"tokens_per_second": ("tokens per second", BLUE)})
_SUPERVISED: Panels = (
    ("cross-entropy", {"loss": ("loss", ORANGE)}),
    ("held-out alignment questions answered right", {"alignment_accuracy": ("accuracy", GREEN)}),
    ("rejections told from likes by the verdict, validation", {"verdict_auc": ("AUC", GREEN)}),
    _SPEED,
)
_GRPO: Panels = (
    (
        "reward and its two terms",
        {
            "reward": ("reward", ORANGE),
            "reward_gain": ("+ rejections", GREEN),
            "reward_penalty": ("- likes", BLUE),
        },
    ),
    ("KL divergence to the start of the stage", {"kl": ("KL", ORANGE)}),
    ("validation anchors", {"validation_fhr": ("FHR", ORANGE), "validation_fph": ("FPH", BLUE)}),
    ("entropy per semantic ID, nats", {"entropy": ("entropy", ORANGE)}),
    (
        "share of groups with",
        {
            "groups_without_variance": ("equal rewards", ORANGE),
            "most_frequent_share": ("the commonest ID", BLUE),
        },
    ),
    ("held-out alignment questions answered right", {"alignment_accuracy": ("accuracy", GREEN)}),
    ("rejections told from likes by the verdict, validation", {"verdict_auc": ("AUC", GREEN)}),
    _SPEED,
)


def plot_training(rows: Rows, url: str) -> None:
    """Writes one PNG: the supervised phases on the left, the GRPO stages on the right, as far as there are any."""
    parts = _parts(rows)
    with style():
        tallest = max((len(panels) for _, panels in parts.values()), default=1)
        figure = Figure(figsize=(WIDTH * max(len(parts), 1), 0.6 + 1.45 * tallest))
        halves = figure.subfigures(1, max(len(parts), 1), squeeze=False)[0]
        for half, (part, panels) in zip(halves, parts.values(), strict=False):
            _panels(half, part, panels)
    storage.write_bytes(url, png(figure))


def training_plots(rows: Rows) -> dict[str, Figure]:
    """The plots of the supervised phases and of the GRPO stages, by name; an empty part is left out."""
    figures = {}
    with style():
        for name, (part, panels) in _parts(rows).items():
            figures[name] = Figure(figsize=(WIDTH, 0.6 + 1.45 * len(panels)))
            _panels(figures[name], part, panels)
    return figures


def _parts(rows: Rows) -> dict[str, tuple[Rows, Panels]]:
    """`supervised` and `grpo`: their rows, and those of their panels that the rows have figures for."""
    stages = {row["phase"] for row in rows if "reward" in row or "stage_accepted" in row}
    parts: dict[str, tuple[Rows, Panels]] = {}
    for name, panels in (("supervised", _SUPERVISED), ("grpo", _GRPO)):
        part = [row for row in rows if (row["phase"] in stages) == (name == "grpo")]
        drawn = [(title, keys) for title, keys in panels if any(key in row for row in part for key in keys)]
        if drawn:
            parts[name] = (part, drawn)
    return parts


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
            above = {"loc": "lower right", "bbox_to_anchor": (1, 0.97), "borderpad": 0, "handlelength": 1}
            axes.legend(frameon=False, fontsize=8, ncols=len(keys), columnspacing=1, **above)
        for phase in phases[1:]:
            axes.axvline(starts[phase], linewidth=0.8, linestyle=":", color=INK, alpha=0.6)
    rejected = {row["phase"] for row in rows if not row.get("stage_accepted", True)}
    # Below the axis on three lines, since the names of short phases would write over one another.
    below = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top", "fontsize": 8}
    for number, phase in enumerate(phases):
        name = f"| {phase}, rejected" if phase in rejected else f"| {phase}"
        grid[-1].annotate(name, (starts[phase], 0), (0, -18 - 12 * (number % 3)), **below)
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
