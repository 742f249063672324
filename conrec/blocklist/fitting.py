"""The score and its thresholds: fitted and calibrated on the windows before the cut.

Everything that decides here stands at the validation time: the catalogue and the policy that were made of what lay
before it, what is counted, and everybody who had a history then. Their windows, until the cut, say what became of it.
Half of the users that a night at that hour would predict for calibrate the thresholds, on the lists that the guardrails
leave: the very code of the night. All others fit the score.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from conrec.blocklist.calibrate import Calibration, at_best
from conrec.blocklist.score import Score
from conrec.config import Config
from conrec.feedback.anchors import LIKED, Anchors, Events, served_anchors
from conrec.feedback.histories import rejections_in_history
from conrec.feedback.outcomes import first_meetings
from conrec.hashing import mix, stable_hash


@dataclass(frozen=True)
class Scoring:
    """What the night ranks and cuts by; `everybody`: the thresholds of the one list that is the same for all users."""

    score: Score
    calibration: Calibration
    everybody: Calibration


def calibration_anchors(events: Events, config: Config, min_negatives: int, min_history: int) -> Anchors:
    """Users with so much history at the validation time, with their windows until the cut."""
    timeline = config.timeline
    end_us = timeline.validation_us + min(timeline.horizon_us, timeline.cut_us - timeline.validation_us)
    return served_anchors(events, timeline.validation_us, min_negatives, min_history, end_us)


def _calibrating(events: Events, anchors: Anchors) -> np.ndarray:
    """Which of the served anchors calibrate: half of the users, by a stable hash of their own. Shape: (A,) bool."""
    return mix(stable_hash(events.users.take(pa.array(anchors.users)))) % np.uint64(2) == 1


def uncalibrated(config: Config, events: Events) -> str | None:
    """Why no policy could calibrate a threshold: too few users; None where one may. `events` reach to the cut."""
    limits = config.guardrails
    anchors = calibration_anchors(events, config, limits.min_negatives, limits.min_history)
    outcomes = first_meetings(events, anchors)
    has_like = np.zeros(len(anchors), bool)
    has_like[outcomes.anchors[outcomes.kinds == LIKED]] = True
    checks = _calibrating(events, anchors)
    return at_best(rejections_in_history(events, anchors)[checks], has_like[checks], config.calibration).silent()


def threshold_warnings(config: Config, events: Events) -> list[str]:
    """Says when nothing will be predicted for anybody, because too few users can calibrate the threshold."""
    silent = uncalibrated(config, events)
    if silent is None:
        return []
    timeline, limits = config.timeline, config.guardrails
    return [
        f"nothing will be predicted: {silent}. They are users with guardrails.min_negatives = {limits.min_negatives} "
        f"rejections and guardrails.min_history = {limits.min_history} items until the validation time, which is "
        f"timeline.validation_days = {timeline.validation_days:g} before timeline.cut, and a like after it; a larger "
        "calibration.alpha needs fewer"
    ]
