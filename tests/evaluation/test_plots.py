"""Pictures are read off their artists: what was given is what is drawn."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from conrec import storage
from conrec.evaluation.plots import calibration_plot, frontier_plot, plot_training, svg, training_plots

ROWS = [
    *({"phase": "alignment", "step": step, "loss": 4.0 - step} for step in (1, 2)),
    *({"phase": "warm_up", "step": step, "loss": 9.0 - step} for step in (1, 2, 3)),
    {"phase": "warm_up", "step": 4, "alignment_accuracy": 0.5},
    *({"phase": "recent", "step": step, "loss": 0.0, "reward": step / 10, "kl": 0.1} for step in (1, 2)),
    {"phase": "recent", "step": 3, "stage_accepted": False, "before_fhr": 0.2, "after_fhr": 0.2},
    *({"phase": "all", "step": step, "loss": 0.0, "reward": step / 5, "kl": 0.1} for step in (1, 2, 3, 4)),
    {"phase": "all", "step": 4, "loss": 0.0, "validation_fhr": 0.3},
    {"phase": "all", "step": 5, "stage_accepted": True, "before_fhr": 0.25, "after_fhr": 0.3},
]


def curve(figure: Figure, label: str) -> list[list[float]]:
    lines = [line for axes in figure.axes for line in axes.get_lines() if line.get_label() == label]
    assert len(lines) == 1, label
    return lines[0].get_xydata().tolist()


def test_steps_run_on_from_phase_to_phase() -> None:
    plots = training_plots(ROWS)
    assert list(plots) == ["supervised", "grpo"]
    assert curve(plots["supervised"], "loss") == [[1, 3], [2, 2], [3, 8], [4, 7], [5, 6]]
    # Measured after the last step of its phase: at its end.
    assert curve(plots["supervised"], "accuracy") == [[5, 0.5]]
    np.testing.assert_allclose(
        curve(plots["grpo"], "reward"), [[1, 0.1], [2, 0.2], [3, 0.2], [4, 0.4], [5, 0.6], [6, 0.8]]
    )


def test_the_state_before_a_stage_is_a_measurement() -> None:
    assert curve(training_plots(ROWS)["grpo"], "FHR") == [[0, 0.2], [2, 0.25], [6, 0.3]]


def test_a_rejected_stage_is_named_so() -> None:
    texts = [text.get_text() for text in training_plots(ROWS)["grpo"].axes[-1].texts]
    assert "| recent, rejected" in texts
    assert "| all" in texts


@pytest.mark.parametrize("rows", [ROWS, ROWS[:2], []])
def test_plot_training_writes_one_picture_of_what_there_is(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    plot_training(rows, f"{tmp_path}/training.png")
    assert storage.read_bytes(f"{tmp_path}/training.png").startswith(b"\x89PNG")


def figures(fhr: float | None, fph: float) -> dict[str, dict[str, float | None]]:
    return {"FHR": {"value": fhr, "low": fhr, "high": fhr}, "FPH": {"value": fph, "low": None, "high": None}}


def test_frontier_joins_systems_in_order_and_skips_the_undefined() -> None:
    systems = {"a": figures(0.2, 0.15), "b": figures(None, 0.1), "c": figures(0.1, 0.05), "d": figures(0.3, 0.2)}
    figure = frontier_plot(systems, ours=["d"], frontiers={"line": ["a", "b", "c"]})
    assert curve(figure, "line") == [[0.15, 0.2], [0.05, 0.1]]
    numbers = [text.get_text() for text in figure.axes[0].texts]
    assert numbers == ["1", "3", "4"], "the numbers of the table, in which b has one too"


def test_numbers_keep_apart_where_points_crowd() -> None:
    systems = {str(i): figures(0.1 + i / 2000, 0.1) for i in range(6)} | {"far": figures(0.3, 0.3)}
    figure = frontier_plot(systems, [], {})
    axes = figure.axes[0]
    figure.draw_without_rendering()
    spots = np.array([axes.transData.transform(text.xy) * 72 / figure.dpi + text.xyann for text in axes.texts])
    gaps = np.linalg.norm(spots[:, None] - spots, axis=-1) + 99 * np.eye(len(spots))
    assert gaps.min() > 7


def test_calibration_marks_theta_and_leaves_zero_out_of_the_logarithm() -> None:
    figure = calibration_plot({"theta": [0, 0.5, 1], "false_block": [0.5, 0.1, 0], "catch": [1, None, 0.2]}, 0.7, 0.01)
    assert curve(figure, "false block")[:2] == [[0, 0.5], [0.5, 0.1]]
    assert np.isnan(curve(figure, "false block")[2][1])
    assert np.isnan(curve(figure, "catch")[1][1])
    assert any("theta = 0.700" in text.get_text() for text in figure.axes[0].texts)
    assert [0.7, 0.7] in [list(line.get_xdata()) for line in figure.axes[0].get_lines()]


def test_svg_is_the_same_on_every_call() -> None:
    systems = {"a": figures(0.2, 0.1)}
    assert svg(frontier_plot(systems, [], {})) == svg(frontier_plot(systems, [], {}))
