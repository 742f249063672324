"""What changed between two published versions: who gained and who lost which rows, by reason.

    changes = diff(root, "20220508T155512Z-4f2a", "20220509T155502Z-91bc")
    changes.reasons["predicted"].rows_lost
    gained, lost = diff_user(root, older, newer, "alice")

A row is a (user, item, reason): an item that was predicted and is rejected now is lost by the one reason and gained by
the other. Invariant: memory is bounded by a bucket and one count per item; the versions may differ in their buckets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conrec.buckets import bucket_of, user_buckets
from conrec.serving import versions
from conrec.serving.rows import bucket_path, read_bucket
from conrec.tables import BLOCKLIST

MOST_AFFECTED = 10
"""Users and items named in a difference."""
_KEY = ("user_id", "item_id", "reason")


@dataclass
class Change:
    """Rows of one reason."""

    users_gained: int = 0
    """Users with at least one row that they did not have."""
    users_lost: int = 0
    rows_gained: int = 0
    rows_lost: int = 0
    rows_kept: int = 0


@dataclass(frozen=True)
class Affected:
    """A user or an item, and how many rows it gained and lost."""

    name: str
    gained: int
    lost: int


@dataclass
class Diff:
    """From the older version to the newer."""

    older: str
    newer: str
    reasons: dict[str, Change] = field(default_factory=dict)
    users: list[Affected] = field(default_factory=list)
    """The most affected, first by rows gained and lost together, then by name."""
    items: list[Affected] = field(default_factory=list)


def diff(root: str, older: str, newer: str) -> Diff:
    """Compares two complete versions. Raises `ArtefactError` where one is unknown, incomplete or damaged."""
    (before, _), (after, _) = (versions.complete_manifest(root, version) for version in (older, newer))
    changes = Diff(older, newer)
    items, users = (_sides(key, BLOCKLIST.empty_table(), BLOCKLIST.empty_table()) for key in ("item_id", "user_id"))
    for bucket in range(after["buckets"]):
        old = users_of_bucket(root, before, bucket, after["buckets"])
        new = users_of_bucket(root, after, bucket, after["buckets"])
        kept, lost = shared_rows(new, old)
        gained_rows, lost_rows = new.filter(pa.array(~kept)), old.filter(pa.array(~lost))
        _count_reasons(changes.reasons, new.filter(pa.array(kept)), gained_rows, lost_rows)
        items = _sums("item_id", [items, _sides("item_id", gained_rows, lost_rows)])
        # A user is in one bucket only: those that are not among the first ten of theirs are not among all.
        users = _most("user_id", _sums("user_id", [users, _sides("user_id", gained_rows, lost_rows)]))
    changes.users, changes.items = _named("user_id", users), _named("item_id", items)
    return changes


def diff_user(root: str, older: str, newer: str, user: str) -> tuple[pa.Table, pa.Table]:
    """The rows that one user gained and lost, as BLOCKLIST tables. Raises `ArtefactError` as `diff`."""
    old, new = (rows_of(root, versions.complete_manifest(root, version)[0], user) for version in (older, newer))
    kept, lost = shared_rows(new, old)
    return new.filter(pa.array(~kept)), old.filter(pa.array(~lost))


def shared_rows(a: pa.Table, b: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of `a` are in `b`, and of `b` in `a`, by user, item and reason. Shape: (len(a),), (len(b),) bool."""
    keys = [np.zeros(len(table), np.int64) for table in (a, b)]
    for name in _KEY:
        values = pa.chunked_array([*a[name].chunks, *b[name].chunks], pa.string()).unique()
        keys = [
            key * max(1, len(values)) + np.asarray(pc.index_in(table[name], value_set=values)).astype(np.int64)
            for key, table in zip(keys, (a, b), strict=True)
        ]
    return np.isin(keys[0], keys[1]), np.isin(keys[1], keys[0])


def users_of_bucket(root: str, manifest: dict[str, Any], bucket: int, buckets: int) -> pa.Table:
    """Item rows of the users that belong to `bucket` of `buckets`, however many the version itself has.

    Raises `ArtefactError` for a damaged file.
    """
    own = manifest["buckets"]
    # A hash that is b modulo n and c modulo m exists only if b and c agree modulo their greatest common divisor.
    step = math.gcd(own, buckets)
    tables = [_read(root, manifest, place) for place in range(bucket % step, own, step)]
    if own != buckets:
        tables = [
            table.filter(pa.array(user_buckets(table["user_id"].combine_chunks(), buckets) == bucket))
            for table in tables
        ]
    return pa.concat_tables(tables)


def rows_of(root: str, manifest: dict[str, Any], user: str) -> pa.Table:
    """The item rows of one user as published; one bucket is read. Raises `ArtefactError` where it is damaged."""
    table = _read(root, manifest, bucket_of(user, manifest["buckets"]))
    return table.filter(pc.equal(table["user_id"], user))


def _read(root: str, manifest: dict[str, Any], bucket: int) -> pa.Table:
    return read_bucket(root, manifest, bucket_path("data", bucket), "data")


def _count_reasons(reasons: dict[str, Change], kept: pa.Table, gained: pa.Table, lost: pa.Table) -> None:
    for side, table in (("kept", kept), ("gained", gained), ("lost", lost)):
        counted = table.group_by("reason").aggregate([([], "count_all"), ("user_id", "count_distinct")])
        for row in counted.to_pylist():
            change = reasons.setdefault(row["reason"], Change())
            setattr(change, f"rows_{side}", getattr(change, f"rows_{side}") + row["count_all"])
            if side != "kept":
                users = getattr(change, f"users_{side}") + row["user_id_count_distinct"]
                setattr(change, f"users_{side}", users)


def _sides(key: str, gained: pa.Table, lost: pa.Table) -> pa.Table:
    """One row for each row gained or lost."""
    is_gain = np.repeat(np.array([1, 0], np.int64), [len(gained), len(lost)])
    names = pa.chunked_array([*gained[key].chunks, *lost[key].chunks], pa.string())
    return pa.table([names, is_gain, 1 - is_gain], [key, "gained", "lost"])


def _sums(key: str, tables: list[pa.Table]) -> pa.Table:
    summed = pa.concat_tables(tables).group_by(key).aggregate([("gained", "sum"), ("lost", "sum")])
    return summed.select([key, "gained_sum", "lost_sum"]).rename_columns([key, "gained", "lost"])


def _most(key: str, sums: pa.Table) -> pa.Table:
    total = pc.add(sums["gained"], sums["lost"])
    order = [("total", "descending"), (key, "ascending")]
    return sums.append_column("total", total).sort_by(order).slice(0, MOST_AFFECTED).drop_columns("total")


def _named(key: str, sums: pa.Table) -> list[Affected]:
    return [Affected(row[key], row["gained"], row["lost"]) for row in _most(key, sums).to_pylist()]
