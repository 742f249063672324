"""The log of all users, a bucket of users at a time: memory is that of a bucket and a block of rows, whatever it holds.

    log = divided(coded_tables, buckets=64)      # of `Coder.code`
    for events in log: ...                       # of each bucket, buckets ascending
    log.of_bucket(3, 64)

The rows are read once and kept in a temporary local folder: 17 bytes an event, and the ids of a block's users once. A
bucket is ordered when it is first asked for, and kept so; the blocks go when all are. Invariant: the events
of a bucket are those that `Events.of_bucket` takes of the whole log, whatever the order of rows and tables; the folder
goes with the log.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conrec.buckets import user_buckets
from conrec.feedback.events import CODED, Events, arranged
from conrec.hashing import mix, stable_hash
from conrec.temporary import folder_of

ROWS_AT_ONCE = 1 << 20
_ROW, _USER, _BYTE = range(3)
_ARRAYS = ((np.int32, _ROW), (np.int32, _ROW), (np.int64, _ROW), (np.int8, _ROW), (np.int32, _USER), (np.uint8, _BYTE))
"""Of a block, one array behind the other: user, item, time and kind of each row, the length of each id, all ids."""


class ByBucket(Protocol):
    """What gives the events of the users of a bucket: all events in memory, or a log that is divided."""

    def of_bucket(self, bucket: int, buckets: int) -> Events:
        """The users of one of so many buckets, with all that they did."""


class Log:
    """What `divided` made: `buckets` of users, `events` in all, `last_us` the time of the last."""

    def __init__(self, buckets: int) -> None:
        self.buckets, self.events, self.last_us = buckets, 0, 0
        self._folder = folder_of(self, "conrec-log-")
        self._ordered: set[int] = set()
        self._blocks: list[np.ndarray] = []
        """Of each block (3, buckets + 1): where rows, users and the bytes of their ids begin in each bucket."""

    def __iter__(self) -> Iterator[Events]:
        for bucket in range(self.buckets):
            yield self.of_bucket(bucket, self.buckets)

    def of_bucket(self, bucket: int, buckets: int) -> Events:
        """The users of one of the log's own number of buckets, with all that they did."""
        assert buckets == self.buckets, f"the log has {self.buckets} buckets, not {buckets}"
        ordered = self._folder / f"{bucket}.npz"
        if bucket in self._ordered:
            with np.load(ordered) as arrays:
                users = _strings(arrays["lengths"], arrays["names"])
                return Events(users, *(arrays[name] for name in ("offsets", "items", "times", "kinds")))
        events = arranged(self._pieces(bucket))
        lengths, names = _texts(events.users)
        np.savez(
            ordered,
            lengths=lengths,
            names=names,
            offsets=events.offsets,
            items=events.items,
            times=events.times,
            kinds=events.kinds,
        )
        self._ordered.add(bucket)
        if len(self._ordered) == self.buckets:  # nothing is read of the blocks again
            for number in range(len(self._blocks)):
                (self._folder / f"{number}.block").unlink()
            self._blocks.clear()
        return events

    def add(self, coded: pa.Table) -> None:
        """Appends a block of rows as CODED, grouped by bucket."""
        encoded = coded["user_id"].unify_dictionaries().combine_chunks()
        # A slice of a table keeps the dictionary of the whole: the ids of users who are not in this block.
        there, codes = np.unique(np.asarray(encoded.indices), return_inverse=True)
        users = encoded.dictionary.take(pa.array(there))
        place = user_buckets(users, self.buckets).astype(np.int32)
        # 1. The ids of the block's users, bucket by bucket.
        by_bucket = np.argsort(place, kind="stable")
        first_user = np.searchsorted(place[by_bucket], np.arange(self.buckets + 1))
        lengths, names = _texts(users.take(pa.array(by_bucket)))
        first_byte = np.concatenate(([0], np.cumsum(lengths)))[first_user]
        # 2. Their rows; a user is his place among those of the block and bucket.
        rank = np.empty(len(place), np.int32)
        rank[by_bucket] = np.arange(len(place)) - first_user[place[by_bucket]]
        of_row = place[codes]
        order = np.argsort(of_row, kind="stable")
        columns = [rank[codes], *(coded[name].to_numpy() for name in CODED.names[1:])]
        first_row = np.concatenate(([0], np.cumsum(np.bincount(of_row, minlength=self.buckets))))
        with (self._folder / f"{len(self._blocks)}.block").open("wb") as file:
            for values in (*(column[order] for column in columns), lengths, names):
                file.write(np.ascontiguousarray(values).data)
        self._blocks.append(np.stack([first_row, first_user, first_byte]))
        self.events += len(coded)
        self.last_us = max(self.last_us, int(columns[2].max(initial=0)))

    def _pieces(self, bucket: int) -> Iterator[pa.Table]:
        """What each block has of a bucket, as CODED."""
        for number, starts in enumerate(self._blocks):
            firsts, counts = starts[:, bucket], starts[:, bucket + 1] - starts[:, bucket]
            if not counts[_ROW]:
                continue
            before, parts = 0, []
            with (self._folder / f"{number}.block").open("rb", buffering=0) as file:
                for kind, what in _ARRAYS:
                    width = np.dtype(kind).itemsize
                    size, offset = int(counts[what]) * width, before + int(firsts[what]) * width
                    parts.append(np.frombuffer(os.pread(file.fileno(), size, offset), kind))
                    before += int(starts[what, -1]) * width
            user, item, time, kinds, lengths, names = parts
            named = pa.DictionaryArray.from_arrays(pa.array(user), _strings(lengths, names))
            yield pa.table([named, pa.array(item), pa.array(time), pa.array(kinds)], schema=CODED)


def drawn(log: Iterable[Events], users: int, most: int, seed: int) -> Events:
    """The events of about `most` of so many users, by a hash of their ids and the seed; of all where there are no more.

    Whether a user is drawn depends on nobody else's events. Memory is theirs, and that of a bucket.
    """
    share = most / max(users, 1)
    parts = []
    for events in log:
        place = mix(stable_hash(events.users) ^ mix(np.array([seed], np.uint64)))
        kept = place.astype(np.float64) < share * 2.0**64 if share < 1 else np.ones(len(place), bool)
        parts.append(events.of(np.flatnonzero(kept)))
    names = pa.chunked_array([part.users for part in parts], pa.string()).combine_chunks()
    offsets = np.concatenate(([0], np.cumsum(np.concatenate([np.diff(part.offsets) for part in parts]))))
    columns = (np.concatenate([getattr(part, name) for part in parts]) for name in ("items", "times", "kinds"))
    # Ascending by id, as everywhere.
    return Events(names, offsets, *columns).of(pc.sort_indices(names).to_numpy())


def gathered(log: Iterable[Events], events: int) -> Iterator[list[Events]]:
    """The buckets in their order, so many together that they hold so many events: pieces of work of about one size.

    The last may hold fewer. Memory is that of so many events, and a bucket.
    """
    waiting: list[Events] = []
    held = 0
    for bucket in log:
        waiting.append(bucket)
        held += len(bucket)
        if held >= events:
            yield waiting
            waiting, held = [], 0
    if waiting:
        yield waiting


def divided(coded: Iterable[pa.Table], buckets: int) -> Log:
    """The log of tables as CODED; one of them is held at a time, and rows that do not fill a block yet."""
    log, waiting = Log(buckets), CODED.empty_table()
    for table in coded:
        # Few blocks: each bucket is put together of a piece of every one.
        waiting = pa.concat_tables([waiting, table])
        while len(waiting) >= ROWS_AT_ONCE:
            log.add(waiting.slice(0, ROWS_AT_ONCE))
            waiting = waiting.slice(ROWS_AT_ONCE)
    if len(waiting):
        log.add(waiting)
    return log


def _texts(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of each text (N,) int32, and all of them in a row, uint8."""
    ends = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset : texts.offset + len(texts) + 1]
    return np.diff(ends), np.frombuffer(texts.buffers()[2] or b"", np.uint8)[ends[0] : ends[-1]]


def _strings(lengths: np.ndarray, names: np.ndarray) -> pa.Array:
    """What `_texts` took apart."""
    ends = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return pa.StringArray.from_buffers(len(lengths), pa.py_buffer(ends), pa.py_buffer(names))
