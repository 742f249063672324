"""What an engine counts for Ray's own metrics, which every node exports for Prometheus while a night generates.

    meters = Meters()                       # in the actor that holds the engine
    meters.count(rows, seconds)             # after each batch

Ray exports them as `ray_conrec_engine_...`, with the node, the session and the worker as labels: a sum over them is the
night's, and a rate of it users a second of all engines.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

COUNTERS = {
    "users": "Users that an engine answered for.",
    "failed_users": "Of these, users whose row says why there is no answer.",
    "ids": "Semantic IDs generated and judged for them.",
}
GAUGES = {"users_per_second": "Of the last batch, by the engine that answered it."}
"""What is counted -> what it says."""


class Meters:
    """The meters of one engine."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge

        self._counters: dict[str, Any] = {
            name: Counter(f"conrec_engine_{name}", description=told) for name, told in COUNTERS.items()
        }
        self._gauges: dict[str, Any] = {
            name: Gauge(f"conrec_engine_{name}", description=told) for name, told in GAUGES.items()
        }

    def count(self, rows: pa.Table, seconds: float) -> None:
        """Counts a batch of GENERATED that took so many seconds."""
        answered = {
            "users": len(rows),
            "failed_users": len(rows) - rows["error"].null_count,
            "ids": pc.sum(pc.list_value_length(rows["leaves"])).as_py() or 0,
        }
        for name, number in answered.items():
            if number:  # Ray refuses to add nothing
                self._counters[name].inc(number)
        self._gauges["users_per_second"].set(len(rows) / seconds)
