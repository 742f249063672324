"""How every picture of the project looks: colours, strokes, labels that keep apart, and the files that come of it.

    with style():
        figure = Figure(figsize=(WIDTH, 4))
        ...
    html = svg(figure)
    file = svg_file(figure)

Invariant: one picture fits light and dark pages. Lines and text are drawn in INK, which the SVG form replaces by
the text colour of the page, and every other colour is readable on white and on black.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ORANGE, BLUE, GREEN, PINK, GREY, VIOLET = "#d55e00", "#2a7fbf", "#009e73", "#cc79a7", "#8a8a8a", "#8a63d2"
"""Colours that the colour-blind tell apart (after Okabe and Ito). Orange is what the reader is asked to judge."""
INK = "#010203"
"""Nearly black; `currentColor` in SVG."""
WIDTH = 4.8
"""Inches: on a phone one point of text is then about one pixel."""

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "conrec",
    "figure.constrained_layout.use": True,
} | dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)

_SCHEMES = "svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}"
# A digit or letter of 8 points takes about this much, in points.
_LETTER, _LINE = 4.6, 9.0


def style() -> AbstractContextManager[None]:
    """Everything drawn inside looks like the project's other pictures."""
    context: AbstractContextManager[None] = rc_context(_STYLE)
    return context


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element that scales to its container and takes the page's text colour."""
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor").strip()


def svg_file(figure: Figure) -> bytes:
    """The figure as a file of its own: no page gives it a text colour, so it follows the reader's scheme itself."""
    text = svg(figure)
    place = text.index(">") + 1
    return f"{text[:place]}<style>{_SCHEMES}</style>{text[place:]}\n".encode()


def png(figure: Figure) -> bytes:
    """The figure as a PNG on white."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()


def numbers(values: Any) -> np.ndarray:
    """The values as floats, None as NaN, which is drawn as a gap."""
    return np.array([np.nan if value is None else value for value in values], float)


def ends(figure: Mapping[str, float | None] | None) -> tuple[float, float, float]:
    """value, low and high of a figure, NaN for what it lacks."""
    figure = figure or {}
    value, low, high = numbers([figure.get(key) for key in ("value", "low", "high")])
    return float(value), float(low), float(high)


def label_points(
    figure: Figure, axes: Axes, places: Mapping[str, tuple[float, float]], bold: str | None = None
) -> None:
    """Writes each label beside its point, at the first of several places around it where it covers nothing.

    Where every place covers a point or another label, the one that covers the least is taken.
    """
    figure.draw_without_rendering()
    scale = 72 / figure.dpi
    centres = {label: axes.transData.transform(place) * scale for label, place in places.items()}
    frame = np.array(axes.get_window_extent().extents) * scale
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False) + np.pi / 2
    ring = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    rings = np.concatenate([distance * ring for distance in (8, 14, 21, 30)])
    # What is taken already, as boxes (left, bottom, right, top): every point with a little air.
    boxes = np.array([np.concatenate([centre - 3, centre + 3]) for centre in centres.values()]).reshape(-1, 4)
    for label, centre in centres.items():
        half = np.array([_LETTER * len(label), _LINE]) / 2
        # A long label stands beside its point, not across it.
        middles = centre + rings + np.sign(np.round(rings, 6)) * (half - half.min()) * [1, 0]
        low, high = middles - half, middles + half
        width = np.minimum(high[:, None, 0], boxes[:, 2]) - np.maximum(low[:, None, 0], boxes[:, 0])
        height = np.minimum(high[:, None, 1], boxes[:, 3]) - np.maximum(low[:, None, 1], boxes[:, 1])
        covered = (np.maximum(width, 0) * np.maximum(height, 0)).sum(axis=1)
        covered += 1e3 * ((low < frame[:2]) | (high > frame[2:])).any(axis=1)
        best = int(np.argmin(covered))
        boxes = np.vstack([boxes, np.concatenate([low[best], high[best]])])
        axes.annotate(
            label,
            places[label],
            tuple(middles[best] - centre),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            fontweight="bold" if label == bold else "normal",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": INK, "shrinkA": 4, "shrinkB": 2},
        )
