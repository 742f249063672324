"""What all pictures share: labels that keep apart, and the form in which they stand in a page."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from conrec.report.drawing import INK, ends, label_points, png, style, svg


def labelled(places: dict[str, tuple[float, float]], size: float = 4.0) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of the labels (n, 4) and their points (n, 2), in pixels, as matplotlib itself lays them out."""
    with style():
        figure = Figure(figsize=(size, size))
        axes = figure.add_subplot()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        label_points(figure, axes, places, bold=None)
        figure.draw_without_rendering()
    # Of the words alone: an annotation's own extent holds its arrow.
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    return (
        np.array([box.extents for box in boxes]),
        np.array([axes.transData.transform(place) for place in places.values()]),
    )


def test_labels_cover_neither_points_nor_one_another() -> None:
    near = {str(i): (0.5 + 0.012 * (i % 4), 0.5 + 0.015 * (i // 4)) for i in range(8)}
    boxes, points = labelled(near | {"a name that is long": (0.5, 0.58), "another long name": (0.56, 0.58)})
    low, high = boxes[:, :2], boxes[:, 2:]
    overlap = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
    # Two pixels of 100 dpi: the boxes of matplotlib hold the air around the letters.
    overlapping = (overlap > 2).all(axis=-1) & ~np.eye(len(boxes), dtype=bool)
    assert not overlapping.any()
    covered = ((points[:, None] > low) & (points[:, None] < high)).all(axis=-1)
    assert not covered.any()


def test_labels_stay_inside_the_frame() -> None:
    boxes, corners = labelled({"in the lower left": (0.0, 0.0), "in the upper right": (1.0, 1.0)})
    assert (boxes[:, :2] > corners[0] - 2).all()
    assert (boxes[:, 2:] < corners[1] + 2).all()


def test_svg_takes_the_text_colour_of_the_page_and_is_the_same_on_every_call() -> None:
    with style():
        figure = Figure()
        figure.add_subplot().set_title("words")
    assert svg(figure) == svg(figure)
    assert svg(figure).startswith("<svg") and svg(figure).endswith("</svg>")
    assert "currentColor" in svg(figure) and INK not in svg(figure)
    assert png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("figure", [None, {}, {"value": None, "low": None, "high": None}])
def test_what_is_missing_is_a_gap(figure: dict[str, float | None] | None) -> None:
    assert np.isnan(ends(figure)).all()
