"""What tests of nights share: a threshold, a table of generated IDs, and two tiny nights known at a glance.

In those every user rejected the first item, then the first two.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa

from conrec import storage
from conrec.blocklist.calibrate import Calibration, Stratum
from conrec.blocklist.counts import Counts, Things
from conrec.blocklist.ranking import Ranking
from conrec.blocklist.score import LOG_PROB, Estimate, Linear, Score
from conrec.serving.reader import BlocklistReader
from conrec.tables import GENERATED

DAY = 86_400_000_000
NOW = 1_700_000_000_000_000
USERS = [f"user{number}" for number in range(6)]
ABOUT = {"watermark_us": NOW, "generated_users": 6, "failed_users": 0}


def at(days):
    """So many days after these nights."""
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=NOW + round(days * DAY))


def opened(root, pointer="current"):
    """A reader in the hour after these nights."""
    return BlocklistReader(root, pointer, lambda: datetime.fromtimestamp(NOW / 1e6, UTC) + timedelta(hours=1))


def content(root, pointer="current"):
    """Version and the items that each user is not shown."""
    reader = opened(root, pointer)
    items = [f"item{item:02d}" for item in range(12)]
    return reader.version, {user: sorted({*items} - {*reader.filter(user, items)}) for user in USERS}


def rejected_by_all(number):
    return {user: [f"item{item:02d}" for item in range(number)] for user in USERS}


OLD, NEW = ("v1", rejected_by_all(1)), ("v2", rejected_by_all(2))


def calibration_of(low, high):
    """The threshold `low` below 3 rejections, `high` from there on."""
    strata = (Stratum(0, 2, 100, low, 0.0), Stratum(3, None, 100, high, 0.0))
    return Calibration(0.01, Stratum(0, None, 200, low, 0.0), strata)


COUNTED, CERTAIN = 0.05, 0.5
"""Thresholds on SAYS that pass the items of every generated ID, and of the most probable one alone."""
SAYS = Score(
    Estimate(Linear({}, -5.0), Linear({}, 0.0)),
    Estimate(Linear({LOG_PROB: 1.0}, 1.0), Linear({}, 0.0)),
    0.3,
)
"""Only what was generated has a score to speak of: sigmoid(1 + log P), for log P as `write_generated` has it."""


def ranking_of(world, events, now=NOW):
    """Ranks by SAYS, what is counted until now."""
    things = Things.of(world.trie.semantic_ids[world.trie.item_leaves], world.trie, {})
    return Ranking(Counts.at(events, now, things), SAYS, world.trie, np.ones(len(world.item_ids), bool))


def write_generated(url, rows):
    """rows: {user: [leaves] or an error}; two files, as a parallel writer leaves them."""
    users = list(rows)
    leaves = [rows[user] if isinstance(rows[user], list) else [] for user in users]
    log_probs = [[-0.5 - rank for rank in range(len(row))] for row in leaves]
    verdicts = [[0.25 * rank - 1 for rank in range(len(row))] for row in leaves]
    errors = [None if isinstance(rows[user], list) else rows[user] for user in users]
    columns = [users, leaves, log_probs, verdicts, errors, [0] * len(users)]
    table = pa.table([pa.array(*pair) for pair in zip(columns, GENERATED.types, strict=True)], schema=GENERATED)
    half = len(users) // 2
    storage.write_table(table.slice(0, half), storage.join(url, "part-0.parquet"))
    storage.write_table(table.slice(half), storage.join(url, "part-1.parquet"))
