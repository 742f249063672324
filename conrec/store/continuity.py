"""How a version differs from the one that readers have, in the two figures that the audit limits: size and overlap.

    change = Continuity.since(root, manifest, settings)
    change.add(root, items, bucket, buckets)            # once for each bucket of the new version

Predicted rows are compared for the users whom both versions predict for, since a release to more users is no change.
Invariant: memory is bounded by one bucket of either version.
"""

from __future__ import annotations

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


class Continuity:
    """Figures against the version before, summed over buckets."""

    def __init__(self, before: dict[str, Any] | None, settings: PublishSettings) -> None:
        self.before = before
        """Its manifest, or None: there is nothing to compare with."""
        self.sizes = {reason: [0, 0] for reason in ("explicit", "predicted")}
        """Rows before and now."""
        self.comparable = self.kept = 0
        """Predicted rows before, of users with predictions in both versions, and how many of them are still there."""
        self._settings = settings

    @classmethod
    def since(cls, root: str, manifest: dict[str, Any], settings: PublishSettings) -> Continuity:
        """Against the version that `manifest` names as the previous one, unless that is missing or damaged."""
        name = manifest.get("previous")
        try:
            return cls(None if name is None else versions.complete_manifest(root, name)[0], settings)
        except ArtefactError:
            return cls(None, settings)

    def add(self, root: str, items: pa.Table, bucket: int, buckets: int) -> None:
        """Counts one bucket of the new version. Where the version before turns out damaged, `before` becomes None."""
        if self.before is None:
            return
        try:
            old = users_of_bucket(root, self.before, bucket, buckets)
        except ArtefactError:
            self.before = None
            return
        for side, table in enumerate((old, items)):
            self.sizes["explicit"][side] += pc.sum(pc.equal(table["reason"], "explicit")).as_py() or 0
        predicted, now = (self._predicted(table) for table in (old, items))
        self.sizes["predicted"][0] += len(predicted)
        self.sizes["predicted"][1] += len(now)
        stay = predicted.filter(pc.is_in(predicted["user_id"], value_set=now["user_id"].unique()))
        self.comparable += len(stay)
        self.kept += int(np.count_nonzero(shared_rows(stay, now)[0]))

    def _predicted(self, table: pa.Table) -> pa.Table:
        """The predicted rows of users whom both versions predict for."""
        assert self.before is not None
        then = self.before["about"].get("audience", _EVERYBODY)
        table = table.filter(pc.equal(table["reason"], "predicted"))
        users = table["user_id"].combine_chunks()
        in_both = predictions_for(users, then["holdout_share"], then["release_share"])
        in_both &= predictions_for(users, self._settings.holdout_share, self._settings.release.share)
        return table.filter(pa.array(in_both))
