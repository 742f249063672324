"""A night whose deadline comes before everybody is generated: who is, and what the others keep.

    ends_at = deadline_of(settings, artefact, began)        # the same one for every try of a night
    reached = reach(artefact, plan, generated, buckets)     # after the generation; writes behind/
    reached.folders(artefact)                               # what is published of

Users whom no engine reached keep the row that an earlier night of the same basis generated for them, less what they
have liked since; it counts, in the audit too, as an answer. Who has none gets explicit rejections alone, and counts
against `publish.min_coverage`. Invariant: a night that leaves somebody behind says so in its figures, its manifest and
its version's name, and is not finished: the same command goes on with them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from conrec import storage
from conrec.artefact import Artefact
from conrec.buckets import rows_of, split
from conrec.config import NightlySettings
from conrec.errors import ArtefactError
from conrec.stages.night_prompts import Plan, bucket_file
from conrec.tables import GENERATED

_USERS = pa.schema([GENERATED.field("user_id")])


@dataclass(frozen=True)
class Reached:
    """How many of a night's users have which rows; they add up to all of them."""

    kept: int
    """Of an earlier night, which an engine would generate again for them."""
    generated: int
    behind: int
    """Those of an earlier prompt: the deadline came first."""
    missing: int
    """None: the deadline came first, and no earlier night knew them."""

    @property
    def whole(self) -> bool:
        """Whether the deadline left nobody."""
        return self.behind + self.missing == 0

    def folders(self, artefact: Artefact) -> list[str]:
        """What is published of."""
        counts = {"kept": self.kept, "generated": self.generated, "behind": self.behind}
        return [artefact.path(name) for name, count in counts.items() if count]

    def about(self) -> dict[str, Any]:
        """What a manifest says of it, beside what every manifest says."""
        if self.whole:
            return {}
        return {"deadline": {"behind_users": self.behind, "missing_users": self.missing}}

    def __str__(self) -> str:
        current = self.kept + self.generated
        users = current + self.behind + self.missing
        return (
            f"{current:,} of {users:,} users are answered for as of tonight ({current / users:.1%}), {self.behind:,} "
            f"keep what an earlier night generated for them, {self.missing:,} have no predictions"
        )


def deadline_of(settings: NightlySettings, artefact: Artefact, began: datetime) -> datetime | None:
    """When a night that began at a moment ends to generate, None where it has no deadline.

    It is that of the night's first try that comes to generating, whose later ones may begin after it, until the night
    has finished: what its deadline left then has a deadline of its own.
    """
    if settings.deadline is None:
        return None
    url, deadline = artefact.path(".deadline.json"), str(settings.deadline)
    if artefact.read() is None and storage.exists(url):
        first = storage.read_json(url)
        if first["deadline"] == deadline:
            return datetime.fromisoformat(first["ends_at"])
    ends_at = settings.ends_at(began)
    assert ends_at is not None
    storage.write_json(url, {"deadline": deadline, "ends_at": ends_at.isoformat()})
    return ends_at


def reach(artefact: Artefact, plan: Plan, generated: int, buckets: int) -> Reached:
    """Who was reached, `generated` of those that were asked for; writes the rows that the others keep.

    Raises `ArtefactError` where more were: somebody was generated for twice, and no run mends that.
    """
    if generated > plan.asked:
        raise ArtefactError(
            f"{artefact.path('generated')}: {generated:,} rows for the {plan.asked:,} users that this night asks for: "
            f"two nights wrote into it at once; delete {artefact.url}, then run {artefact.command}"
        )
    storage.remove(artefact.path("behind"))  # of a run that ended earlier
    if generated == plan.asked:
        return Reached(plan.kept, generated, 0, 0)
    behind = 0
    with tempfile.TemporaryDirectory(prefix="conrec-reached-") as folder:
        split(_users(artefact), Path(folder), _USERS, buckets)
        for bucket in range(buckets):
            url = artefact.path("earlier", bucket_file(bucket))
            if not storage.exists(url):
                continue
            reached = rows_of(Path(folder), _USERS, bucket)["user_id"]
            earlier = storage.read_table(url)
            rows = earlier.filter(pc.invert(pc.is_in(earlier["user_id"], value_set=reached)))
            if len(rows):
                storage.write_table(rows, artefact.path("behind", bucket_file(bucket)))
            behind += len(rows)
    return Reached(plan.kept, generated, behind, plan.asked - generated - behind)


def _users(artefact: Artefact) -> Iterator[pa.Table]:
    for url in storage.list_parquet(artefact.path("generated")):
        yield storage.read_table(url, columns=["user_id"]).cast(_USERS)


def goes_on(figures: Mapping[str, Any]) -> str | None:
    """Why a finished night is to go on, None where its deadline left nobody."""
    left = figures.get("behind", 0) + figures.get("missing", 0)
    return f"its deadline left {left:,} users: it goes on with them" if left else None
