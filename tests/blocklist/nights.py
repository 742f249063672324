"""Two tiny nights whose content is known at a glance: every user rejected the first item, then the first two."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from conrec.blocklist.reader import BlocklistReader

DAY = 86_400_000_000
NOW = 1_700_000_000_000_000
USERS = [f"user{number}" for number in range(6)]
ABOUT = {"watermark_us": NOW, "generated_users": 6, "failed_users": 0}


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
