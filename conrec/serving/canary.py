"""A canary: some users get a version of its own, another policy's for example, all others the version that is served.

    current, canary = BlocklistReader("mirror"), BlocklistReader("mirror-of-the-shadow", "shadow")
    reader = reader_for("alice", current, canary)       # then reader.filter("alice", items), and log reader.version

Who they are is decided where the night is published: `publish.release.share` of the version that the second pointer
names. Invariant: the share is drawn by a stable hash, so that a user stays on one side and a larger share contains a
smaller one; and a canary that nobody renews ends with the next night of the others.
"""

from __future__ import annotations

from datetime import timedelta

from conrec.serving.reader import BlocklistReader

RENEWED_WITHIN = timedelta(hours=12)
"""How much earlier than that of the others a canary's log may end: two nights of one day read what is there."""


def reader_for(user_id: str, current: BlocklistReader, canary: BlocklistReader) -> BlocklistReader:
    """The reader whose version a user is served from; a microsecond, no IO."""
    renewed = canary.watermark > current.watermark - RENEWED_WITHIN
    return canary if renewed and canary.released(user_id) else current
