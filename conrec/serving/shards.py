"""A share of the users, for a fleet whose machines each serve some: those whose stable hash is 3 modulo 16, say.

    shard = Shard.of("3/16")
    shard.holds("alice")          # bucket_of("alice", 16) == 3: where the router sends a request

Invariant: who belongs to a shard depends on the user id alone, not on how many buckets a night has: that number has
only to be a multiple of the number of shards, so that a shard is whole buckets and no other file is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from conrec.buckets import bucket_of
from conrec.errors import ArtefactError

_WRITTEN = re.compile(r"([0-9]{1,6})/([1-9][0-9]{0,5})")


@dataclass(frozen=True)
class Shard:
    """Number `index`, from 0, of `count` shards."""

    index: int
    count: int

    @classmethod
    def of(cls, text: str) -> Shard:
        """Reads `3/16`. Raises `ArtefactError` for anything else."""
        written = _WRITTEN.fullmatch(text)
        if written is None:
            raise ArtefactError(f"shard {text!r}: write the number of the shard, from 0, and how many there are: 3/16")
        index, count = map(int, written.groups())
        if index >= count:
            raise ArtefactError(f"shard {text}: of {count} shards the last is {count - 1}/{count}")
        return cls(index, count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @staticmethod
    def told(shard: Shard | None) -> str:
        """In a message: whose rows somewhere are."""
        return "all users" if shard is None else f"shard {shard}"

    def holds(self, user_id: str) -> bool:
        """Whether the user belongs to it; a few microseconds."""
        return bucket_of(user_id, self.count) == self.index

    def has(self, bucket: int) -> bool:
        """Whether the users of a bucket belong to it, of a version that it divides."""
        return bucket % self.count == self.index

    def require_divides(self, buckets: int, source: str) -> None:
        """Raises `ArtefactError`, in which `source` names the version, unless its buckets make such shards."""
        if buckets % self.count:
            raise ArtefactError(
                f"{source}: has {buckets} buckets, which do not make {self.count} shards; publish with a multiple of "
                f"{self.count} as publish.buckets, or take fewer shards"
            )
