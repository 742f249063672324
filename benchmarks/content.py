"""What it costs to see whether the log changed: before the first night, the next one, and one without new events.

    .venv/bin/python benchmarks/content.py

The example's events under new users, a file a day; writes benchmarks/content.json.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet

from conrec.config import InteractionSettings, load_settings
from conrec.feedback.content import LogContent
from conrec.feedback.labels import read_interactions

HOME = Path(__file__).parents[1]
DAYS = 20
ROWS_A_DAY = 1_000_000


def main() -> None:
    """Measures and writes the JSON."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        log.mkdir()
        for day in range(DAYS - 1):
            write_day(log, day)
        settings = InteractionSettings(path=str(log))
        cache = f"{folder}/inputs.json"
        first = seconds(settings, cache)
        write_day(log, DAYS - 1)
        figures = {
            "rows": DAYS * ROWS_A_DAY,
            "files": DAYS,
            "first_seconds": first,
            "first_rows_per_second": round((DAYS - 1) * ROWS_A_DAY / first),
            "next_night_seconds": seconds(settings, cache),
            "unchanged_seconds": seconds(settings, cache),
        }
    (HOME / "benchmarks" / "content.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def write_day(log: Path, day: int) -> None:
    """One file: the example's events, each day of other users."""
    events = read_interactions(load_settings(HOME / "examples" / "kuairand" / "conrec.toml").interactions)
    columns = ["user_id", "item_id", "timestamp", "feedback"]
    copies = []
    for copy in range(-(-ROWS_A_DAY // len(events))):
        users = pc.binary_join_element_wise(events["user_id"], pa.scalar(f"{day}.{copy}"), "-")
        copies.append(events.select(columns).set_column(0, "user_id", users))
    parquet.write_table(pa.concat_tables(copies).slice(0, ROWS_A_DAY), log / f"{day:02}.parquet")


def seconds(settings: InteractionSettings, cache: str) -> float:
    """Of one check of the whole log."""
    began = time.perf_counter()
    LogContent(settings, cache).until().digest  # noqa: B018
    return round(time.perf_counter() - began, 3)


if __name__ == "__main__":
    main()
