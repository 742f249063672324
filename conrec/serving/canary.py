"""A canary: some users get a version of its own, another policy's for example, all others the version that is served.

    current, canary = BlocklistReader("mirror"), BlocklistReader("mirror-of-the-shadow", "shadow")
    reader = reader_for("alice", current, canary)       # then reader.filter("alice", items), and log reader.version

Who they are is decided where the night is published: `publish.release.share` of the version that the second pointer
names. Invariant: the share is drawn by a stable hash, so that a user stays on one side and a larger share contains a
smaller one; and a canary that nobody renews ends with the next night of the others, since it must not be the older one.
"""

from __future__ import annotations

from conrec.serving.reader import BlocklistReader


def reader_for(user_id: str, current: BlocklistReader, canary: BlocklistReader) -> BlocklistReader:
    """The reader whose version a user is served from; a microsecond, no IO."""
    newer = canary.watermark >= current.watermark
    return canary if newer and canary.released(user_id) else current
