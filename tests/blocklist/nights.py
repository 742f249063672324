"""Two tiny nights whose content is known at a glance: every user rejected the first item, then the first two."""

from __future__ import annotations

from conrec.blocklist.reader import BlocklistReader

DAY = 86_400_000_000
NOW = 1_700_000_000_000_000
USERS = [f"user{number}" for number in range(6)]
ABOUT = {"watermark_us": NOW, "generated_users": 6, "failed_users": 0}


def content(root, pointer="current"):
    """Version and item IDs of each user, as a reader sees them."""
    reader = BlocklistReader(root, pointer)
    return reader.version, {user: [row.item_id for row in reader.blocklist(user)] for user in USERS}


def rejected_by_all(number):
    return {user: [f"item{item:02d}" for item in range(number)] for user in USERS}


OLD, NEW = ("v1", rejected_by_all(1)), ("v2", rejected_by_all(2))
