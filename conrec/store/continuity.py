"""How a version differs from the one that readers have, in the two figures that the audit limits: size and overlap.

    before = Before.of(root, manifest, settings)             # None: nothing to compare with
    change = total(before.change(items, bucket, buckets) for each bucket of the new version)

Predicted rows are compared for the users whom both versions predict for, since a release to more users is no change.
Invariant: memory is bounded by one bucket of either version.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conrec.errors import ArtefactError
from conrec.serving import versions
from conrec.serving.audience import predictions_for
from conrec.store.diff import shared_rows, users_of_bucket

if TYPE_CHECKING:
    from conrec.config import PublishSettings

_EVERYBODY = {"holdout_share": 0.0, "release_share": 1.0}


@dataclass(frozen=True)
class Change:
    """Of one bucket, or of many together. `explicit` and `predicted`: rows before and now."""

    explicit: tuple[int, int] = (0, 0)
    predicted: tuple[int, int] = (0, 0)
    comparable: int = 0
    """Predicted rows before, of users with predictions in both versions."""
    kept: int = 0
    """How many of them are still there."""

    def __add__(self, other: Change) -> Change:
        return Change(
            (self.explicit[0] + other.explicit[0], self.explicit[1] + other.explicit[1]),
            (self.predicted[0] + other.predicted[0], self.predicted[1] + other.predicted[1]),
            self.comparable + other.comparable,
            self.kept + other.kept,
        )


def total(changes: Iterable[Change | None]) -> Change | None:
    """Of all buckets; None where one of them could not be compared."""
    change = Change()
    for one in changes:
        if one is None:
            return None
        change += one
    return change


@dataclass(frozen=True)
class Before:
    """A complete version that another one follows, and the settings of that other one."""

    root: str
    manifest: dict[str, Any]
    settings: PublishSettings

    @classmethod
    def of(cls, root: str, manifest: dict[str, Any], settings: PublishSettings) -> Before | None:
        """The version that `manifest` names as the previous one, unless there is none or it is missing or damaged."""
        name = manifest.get("previous")
        try:
            return None if name is None else cls(root, versions.complete_manifest(root, name)[0], settings)
        except ArtefactError:
            return None

    def change(self, items: pa.Table, bucket: int, buckets: int) -> Change | None:
        """How one bucket differs, of so many in the new version; None where this version turns out damaged."""
        try:
            old = users_of_bucket(self.root, self.manifest, bucket, buckets)
        except ArtefactError:
            return None
        explicit = tuple(pc.sum(pc.equal(table["reason"], "explicit")).as_py() or 0 for table in (old, items))
        predicted, now = (self._predicted(table) for table in (old, items))
        stay = predicted.filter(pc.is_in(predicted["user_id"], value_set=now["user_id"].unique()))
        kept = int(np.count_nonzero(shared_rows(stay, now)[0]))
        return Change((explicit[0], explicit[1]), (len(predicted), len(now)), len(stay), kept)

    def _predicted(self, table: pa.Table) -> pa.Table:
        """The predicted rows of users whom both versions predict for."""
        then = self.manifest["about"].get("audience", _EVERYBODY)
        table = table.filter(pc.equal(table["reason"], "predicted"))
        users = table["user_id"].combine_chunks()
        in_both = predictions_for(users, then["holdout_share"], then["release_share"])
        in_both &= predictions_for(users, self.settings.holdout_share, self.settings.release.share)
        return table.filter(pa.array(in_both))
