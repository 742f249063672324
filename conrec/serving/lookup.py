"""The rows of a version as flat arrays, laid out for the question of a request: which rows does this user have?

    rows = Compiled(arrays).rows("alice")            # a slice; arrays["item_id"][rows], ...

A request costs what it touches: every place of memory that nobody asked for lately takes longer than the work on it.
So users stand in the order of (bucket, hash), a small index over the first bits of the hash leads to one or two of
them, and what is known of one is one record. The ids of the items that a user's rows block are also there as one piece
of text, which a request splits: quicker than looking up thirty texts. Only where a row of the user has ended does it
read the rows themselves. In those text is a number, and so are reason and times together, which few rows differ in.

Invariant: nothing is changed once it was made, so that any number of threads may ask. Needs numpy only.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Set

import numpy as np

from conrec.hashing import stable_hash_of
from conrec.serving.rows import BLOCKING_REASONS

SEPARATOR = "\x1f"
"""Behind the id of each blocked item; a user with an id that holds it is answered from the rows."""
HASH, ID, ROW, BLOCKED, UNTIL = FIELDS = range(5)
"""Of a user's record: the hash, where the id, the rows and the text of blocked items begin (they end where those of the
next user do), and the moment from which that text no longer holds, microseconds."""
WIDTH = len(FIELDS)
_HASH_BITS = 64

Arrays = Mapping[str, np.ndarray]


class Compiled:
    """Arrays of one version, ready to be asked by any number of threads. Never changed."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays
        # Single numbers are read several times faster from a memoryview than from an array.
        self._users = arrays["users"].data
        self._ids = arrays["user_bytes"].data
        self._blocked = arrays.get("blocked_bytes", np.zeros(0, np.uint8)).data
        records = arrays["users"].reshape(-1, WIDTH)
        self._longest = int(np.diff(records[:, ID]).max(initial=0))
        self._buckets = len(arrays["bucket_users"]) - 1
        self._shift, slots = _index(arrays["bucket_users"], records[:-1, HASH])
        self._slots = slots.data
        self._texts = {
            name.removesuffix("_ends"): Texts(arrays, name.removesuffix("_ends"))
            for name in arrays
            if name.endswith("_ends")
        }
        self._blocking: np.ndarray | None = None
        if "term_reason" in arrays:
            reasons = self._texts["reason"].take(list(range(len(self._texts["reason"]))))
            blocking = np.array([reason in BLOCKING_REASONS for reason in reasons], bool)
            # Where every reason blocks, which is the rule, a request need not look at reasons.
            self._blocking = None if blocking[1:].all() else blocking

    @property
    def users(self) -> int:
        """Users with rows."""
        return len(self._users) // WIDTH - 1

    def rows(self, user_id: str) -> slice:
        """The rows of a user, empty for an unknown one."""
        record = self._record(user_id)
        if record is None:
            return slice(0, 0)
        return slice(self._users[record + ROW], self._users[record + WIDTH + ROW])

    def blocked(self, user_id: str, now_us: int) -> Set[str | None]:
        """The items that are blocked for a user; none for an unknown one. Of the shape `data` only."""
        record = self._record(user_id)
        if record is None:
            return set()
        users = self._users
        if now_us >= users[record + UNTIL]:
            rows = slice(users[record + ROW], users[record + WIDTH + ROW])
            live = self.live(rows, "demotes_at", now_us)
            return set(self.text("item_id").take(self.arrays["item_id"][live].tolist()))
        begin, end = users[record + BLOCKED], users[record + WIDTH + BLOCKED]
        if begin == end:
            return set()
        return set(str(self._blocked[begin : end - 1], "utf-8").split(SEPARATOR))

    def _record(self, user_id: str) -> int | None:
        """Where the record of a user begins."""
        user = user_id.encode(errors="surrogatepass")
        if len(user) > self._longest:
            return None  # before the hash, which takes its time for an id of megabytes
        value = stable_hash_of(user_id)
        slot = (value % self._buckets << _HASH_BITS - self._shift) + (value >> self._shift)
        signed = value - (value >> _HASH_BITS - 1 << _HASH_BITS)
        users = self._users
        for record in range(self._slots[slot], self._slots[slot + 1], WIDTH):
            if users[record] == signed and self._ids[users[record + ID] : users[record + WIDTH + ID]] == user:
                return record
        return None

    def live(self, rows: slice, until: str, now_us: int) -> np.ndarray:
        """Those of the rows that act: their time `until`, a column, is later than now. Shape: (R,) int64 positions."""
        terms = self.arrays["term"][rows]
        acts = self.arrays[f"term_{until}"][terms] > now_us
        if self._blocking is not None:
            acts &= self._blocking[self.arrays["term_reason"][terms]]
        live: np.ndarray = acts.nonzero()[0] + rows.start
        return live

    def text(self, column: str) -> Texts:
        """The texts that the numbers of a column stand for."""
        return self._texts[column]


def _index(bucket_users: np.ndarray, hashes: np.ndarray) -> tuple[int, np.ndarray]:
    """Where the users of each bucket begin whose hash begins with each possible row of bits, some two users a place.

    Shape: bucket_users (B + 1,), hashes (U,) int64, ascending in each bucket as uint64; returns how many bits of a hash
    are left out, and record positions (B * places + 1,) int64.
    """
    buckets = len(bucket_users) - 1
    bits = max(0, int(np.diff(bucket_users).max(initial=0) // 2).bit_length())
    shift = _HASH_BITS - bits
    firsts = np.arange(1 << bits, dtype=np.uint64) << np.uint64(shift) if bits else np.zeros(1, np.uint64)
    slots = np.empty((buckets << bits) + 1, np.int64)
    slots[-1] = bucket_users[-1]
    for bucket, (begin, end) in enumerate(itertools.pairwise(bucket_users)):
        here = np.ascontiguousarray(hashes[begin:end]).view(np.uint64)
        slots[bucket << bits : bucket + 1 << bits] = begin + np.searchsorted(here, firsts)
    return shift, slots * WIDTH


class Texts:
    """Texts by number, decoded when they are first asked for and then kept; 0 is None."""

    def __init__(self, arrays: Arrays, column: str) -> None:
        self._ends = arrays[f"{column}_ends"].data
        self._data = arrays[f"{column}_bytes"].data
        self._kept: list[str | None] = [None] * len(self._ends)

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, numbers: list[int]) -> list[str | None]:
        """The texts of some numbers."""
        texts = list(map(self._kept.__getitem__, numbers))
        if None in texts:
            # Threads that decode the same text at once write equal ones.
            for place in [place for place, text in enumerate(texts) if text is None and numbers[place]]:
                number = numbers[place]
                text = bytes(self._data[self._ends[number - 1] : self._ends[number]]).decode()
                texts[place] = self._kept[number] = text
        return texts
