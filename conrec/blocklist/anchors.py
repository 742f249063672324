"""Whom a night predicts for."""

from __future__ import annotations

import numpy as np

from conrec.blocklist.calibrate import Calibration
from conrec.config import Config
from conrec.feedback.anchors import Anchors, served_anchors
from conrec.feedback.events import Events
from conrec.progress import console, warn


def tonights_anchors(config: Config, events: Events, watermark_us: int, calibration: Calibration) -> Anchors:
    """Users to generate for: enough history, the most recently active first where their number is limited.

    Nobody, where nothing can be predicted: why, is said.
    """
    limits, silent = config.guardrails, calibration.silent()
    anchors = served_anchors(events, watermark_us, limits.min_negatives, limits.min_history)
    if not len(anchors):
        warn(
            f"nothing is predicted tonight: none of {len(events.users):,} users has guardrails.min_negatives = "
            f"{limits.min_negatives} rejections and guardrails.min_history = {limits.min_history} items"
        )
    elif silent is not None:
        warn(f"nothing is predicted tonight: {silent}")
        anchors = anchors.take(np.zeros(0, np.int64))
    if not len(anchors):
        console.print("  nothing is generated; explicit rejections are published")
    if config.generate.max_users is not None and len(anchors) > config.generate.max_users:
        newest = np.argsort(-events.times[anchors.ends - 1], kind="stable")[: config.generate.max_users]
        anchors = anchors.take(np.sort(newest))
    return anchors
