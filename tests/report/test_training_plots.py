"""The course of training, read off the artists: what was given is what is drawn."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from conrec import storage
from conrec.report.training_plots import plot_training, training_plots

ROWS = [
    *({"phase": "alignment", "step": step, "loss": 4.0 - step} for step in (1, 2)),
    *({"phase": "warm_up", "step": step, "loss": 9.0 - step} for step in (1, 2, 3)),
    {"phase": "warm_up", "step": 4, "alignment_accuracy": 0.5, "verdict_auc": 0.68},
    *({"phase": "recent", "step": step, "loss": 0.0, "reward": step / 10, "kl": 0.1} for step in (1, 2)),
    {"phase": "recent", "step": 3, "stage_accepted": False, "before_fhr": 0.2, "after_fhr": 0.2},
    {"phase": "recent", "step": 3, "verdict_auc": 0.67},
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
    assert curve(plots["supervised"], "AUC") == [[5, 0.68]] and curve(plots["grpo"], "AUC") == [[2, 0.67]]
    np.testing.assert_allclose(
        curve(plots["grpo"], "reward"), [[1, 0.1], [2, 0.2], [3, 0.2], [4, 0.4], [5, 0.6], [6, 0.8]]
    )


def test_the_state_before_a_stage_is_a_measurement() -> None:
    assert curve(training_plots(ROWS)["grpo"], "FHR") == [[0, 0.2], [2, 0.25], [6, 0.3]]


def test_a_stage_without_rewards_is_a_stage_all_the_same() -> None:
    rows = [{key: value for key, value in row.items() if key != "reward"} for row in ROWS]
    plots = training_plots(rows)
    assert curve(plots["supervised"], "loss") == [[1, 3], [2, 2], [3, 8], [4, 7], [5, 6]]
    assert curve(plots["grpo"], "FHR") == [[0, 0.2], [2, 0.25], [6, 0.3]]


def test_a_rejected_stage_is_named_so() -> None:
    texts = [text.get_text() for text in training_plots(ROWS)["grpo"].axes[-1].texts]
    assert "| recent, rejected" in texts
    assert "| all" in texts


@pytest.mark.parametrize("rows", [ROWS, ROWS[:2], []])
def test_plot_training_writes_one_picture_of_what_there_is(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    plot_training(rows, f"{tmp_path}/training.png")
    assert storage.read_bytes(f"{tmp_path}/training.png").startswith(b"\x89PNG")
