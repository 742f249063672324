"""Whom a night predicts for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conrec.blocklist.calibrate import Calibration
from conrec.config import Config, GuardrailSettings
from conrec.feedback.anchors import Anchors, served_anchors
from conrec.feedback.events import Events
from conrec.progress import console, warn


@dataclass(frozen=True)
class Asked:
    """Users to generate for, `count` of them: those of so much history, and with `names` only those among them."""

    watermark_us: int
    limits: GuardrailSettings
    count: int
    names: pa.Array | None

    def anchors(self, events: Events) -> Anchors:
        """Those of a bucket's users, ascending."""
        anchors = served_anchors(events, self.watermark_us, self.limits.min_negatives, self.limits.min_history)
        if self.names is None:
            return anchors
        names = events.users.take(pa.array(anchors.users))
        return anchors.take(np.asarray(pc.is_in(names, value_set=self.names)))


def tonights_users(config: Config, log: Iterable[Events], watermark_us: int, calibration: Calibration) -> Asked:
    """Users to generate for: enough history, the most recently active first where their number is limited.

    Nobody, where nothing can be predicted: why, is said. `log` gives the events bucket by bucket.
    """
    limits, silent, most = config.guardrails, calibration.silent(), config.generate.max_users
    everybody = Asked(watermark_us, limits, 0, None)
    users = count = 0
    newest = pa.table({"user_id": pa.array([], pa.string()), "time": pa.array([], pa.int64())})
    for events in log:
        anchors = everybody.anchors(events)
        users, count = users + len(events.users), count + len(anchors)
        if most is not None:
            times = pa.array(events.times[anchors.ends - 1])
            table = pa.table({"user_id": events.users.take(pa.array(anchors.users)), "time": times})
            newest = pa.concat_tables([newest, table]).sort_by([("time", "descending"), ("user_id", "ascending")])
            newest = newest.slice(0, most)
    if not count:
        warn(
            f"nothing is predicted tonight: none of {users:,} users has guardrails.min_negatives = "
            f"{limits.min_negatives} rejections and guardrails.min_history = {limits.min_history} items"
        )
    elif silent is not None:
        warn(f"nothing is predicted tonight: {silent}")
        count, newest = 0, newest.slice(0, 0)
    if not count:
        console.print("  nothing is generated; explicit rejections are published")
        return Asked(watermark_us, limits, 0, pa.array([], pa.string()))
    if most is not None and count > most:
        return Asked(watermark_us, limits, most, newest["user_id"].combine_chunks())
    return Asked(watermark_us, limits, count, None)
