"""What is published, in words: `conrec show USER`, `conrec versions`, `conrec diff A B`.

Imports no torch, ray or vllm: it answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

from conrec import storage
from conrec.catalogue.codebook import format_semantic_ids
from conrec.catalogue.items import item_words
from conrec.config import Config
from conrec.feedback.labels import interaction_tables
from conrec.progress import console
from conrec.ragged import Ragged
from conrec.serving import versions
from conrec.serving.reader import BlockedItem
from conrec.stages.inputs import blocklists_url
from conrec.store.diff import diff, diff_user, rows_of
from conrec.store.inventory import inventory
from conrec.tables import INTERACTIONS

LINES = 8
"""Shown of each part unless all is asked for."""


def published(config: Config) -> list[str]:
    """A line for each of what `inventory` finds: `!` is damaged, `*` what serving reads, `s` published beside it.

    Raises `ArtefactError` where nothing is published.
    """
    found = inventory(blocklists_url(config))
    marks = dict(zip(versions.POINTERS, "*s", strict=True))

    def marked(version: str) -> str:
        return "".join(marks[pointer] for pointer, name in found.pointers.items() if name == version) or " "

    return [
        *(f"! {damage}" for damage in found.damaged),
        *(f"{marked(name)} {name}  not complete" for name in found.not_complete),
        *(f"{marked(manifest['version'])} {_version_line(manifest)}" for manifest in found.manifests),
    ]


def _version_line(manifest: dict[str, Any]) -> str:
    watermark = datetime.fromtimestamp(manifest["about"]["watermark_us"] // 1_000_000, UTC)
    published_at = datetime.fromisoformat(manifest["published_at"])
    figures = manifest["figures"]
    return (
        f"{manifest['version']}  interactions until {watermark:%Y-%m-%d %H:%M}, "
        f"published {published_at:%Y-%m-%d %H:%M}, {figures['rows']:,} rows of {figures['users']:,} users, "
        f"after {manifest['previous'] or 'none'}"
    )


@dataclass(frozen=True)
class Pictures:
    """What is published for some users, beside what it was made from."""

    blocked: Mapping[str, list[BlockedItem]]
    """User -> rows as published, explicit ones first, then by score; past ones too."""
    interactions: pa.Table
    """What these users did."""
    words: dict[str, str] = field(repr=False)
    """Item -> category, or the start of its text."""
    meaning: dict[str, str] = field(repr=False)
    """Semantic ID -> the most frequent words of the items that have it."""
    policy: str
    """Which policy predicted, in words."""

    @classmethod
    def load(cls, config: Config, users: Sequence[str], version: str | None = None) -> Pictures:
        """Reads of a version the buckets of these users, and of the log their events, a million in memory at a time.

        The version is by default the current one, the shadow where the settings publish one. Raises `ArtefactError`
        where there is none.
        """
        root = blocklists_url(config)
        if version is None:
            manifest = versions.pointed_manifest(root, versions.require_pointer(root, config.publish.release.pointer))
        else:
            manifest, _ = versions.complete_manifest(root, version)
        about = manifest["about"]
        items = storage.read_table(storage.join(config.root, "nightly", about["settings"], "items.parquet"))
        words = item_words(items)
        codes = Ragged.from_arrow(items["semantic_id"]).values.reshape(items.num_rows, -1)
        named = pa.table({"id": pa.array(format_semantic_ids(codes)), "words": words})
        # Ties by the alphabet, so that the same run reads the same tomorrow.
        counted = named.group_by(["id", "words"]).aggregate([([], "count_all")])
        counted = counted.sort_by([("count_all", "ascending"), ("words", "descending")])
        meaning = dict(zip(counted["id"].to_pylist(), counted["words"].to_pylist(), strict=True))
        tables = interaction_tables(config.interactions)
        theirs = [
            table.select(INTERACTIONS.names).filter(pc.field("user_id").isin(pa.array(users, pa.string())))
            for table in tables
        ]
        return cls(
            {user: [_blocked(row) for row in rows_of(root, manifest, user).to_pylist()] for user in users},
            pa.concat_tables(theirs),
            dict(zip(items["item_id"].to_pylist(), words, strict=True)),
            meaning,
            f"policy {about['policy']} of {_minute(about['trained_at'])}, trained until "
            f"{_minute(about['trained_until'])}",
        )

    def rejected(self, user_id: str) -> list[str]:
        """Items that the user rejected, newest first."""
        rows = self.interactions.filter(
            (pc.field("user_id") == user_id) & (pc.field("feedback") == "negative")
        ).sort_by([("timestamp", "descending")])
        return list(dict.fromkeys(rows["item_id"].to_pylist()))

    def show(self, user_id: str, lines: int | None = LINES) -> None:
        """Prints the user: what they rejected, what is blocked and why: the first predicted rows, or all rows."""
        rejected = self.rejected(user_id)
        blocked = self.blocked[user_id]
        explicit = [row for row in blocked if row.reason == "explicit"]
        predicted = [row for row in blocked if row.reason == "predicted"]
        console.print(f"user {user_id}", style="bold")
        if not rejected and not blocked:
            console.print("  unknown: nothing is blocked")
            return
        console.print(f"  rejected {len(rejected)} items:")
        counted: dict[str, int] = {}
        for item in rejected:
            words = self.words.get(item, "not in the catalogue")
            counted[words] = counted.get(words, 0) + 1
        _lines([f"{count:3} x  {words}" for words, count in counted.items()], lines)
        console.print(
            f"  blocked {len(blocked)}: {len(explicit)} that they rejected themselves, {len(predicted)} predicted:"
        )
        _lines([self._line(row) for row in (blocked if lines is None else predicted)], lines)

    def _line(self, row: BlockedItem) -> str:
        item = f"{row.item_id}  {self.words.get(row.item_id, '')}"
        if row.reason == "explicit":
            return f"{item}  <- rejected, blocked until {row.demotes_at:%Y-%m-%d %H:%M}"
        found = "found by what is counted"
        if row.similarity > 0:
            meaning = self.meaning.get(row.semantic_id or "", "")
            found = f"near {row.semantic_id} ({meaning}), similarity {row.similarity:.2f}"
        return f"{item}  <- score {row.score:.3g}, {found}"


def _blocked(row: dict[str, Any]) -> BlockedItem:
    return BlockedItem(**{name: row[name] for name in BlockedItem.__dataclass_fields__})


def _minute(moment: str) -> str:
    return f"{datetime.fromisoformat(moment):%Y-%m-%d %H:%M}"


def differences(config: Config, older: str, newer: str) -> list[Table]:
    """What changed between two versions, as tables to print: by reason, then the most affected users and items.

    Raises `ArtefactError` for a version that is unknown, incomplete or damaged.
    """
    found = diff(blocklists_url(config), older, newer)
    titles = {"rows_gained": "rows gained", "rows_lost": "lost", "rows_kept": "kept"}
    titles |= {"users_gained": "users who gained", "users_lost": "who lost"}
    reasons = _table("reason", *titles.values())
    for reason, change in sorted(found.reasons.items()):
        reasons.add_row(reason, *(f"{getattr(change, name):,}" for name in titles))
    tables = [reasons]
    for what, affected in (("most affected users", found.users), ("most affected items", found.items)):
        table = _table(what, "rows gained", "lost")
        for one in affected:
            table.add_row(one.name, f"{one.gained:,}", f"{one.lost:,}")
        tables.append(table)
    return tables


def user_differences(config: Config, older: str, newer: str, user_id: str) -> Table:
    """The rows that one user gained (+) and lost (-) between two versions, as a table to print."""
    table = _table("", "item", "reason", "semantic ID", "score")
    for sign, rows in zip("+-", diff_user(blocklists_url(config), older, newer, user_id), strict=True):
        for row in rows.to_pylist():
            texts = (row["item_id"], row["reason"], row["semantic_id"] or "")
            table.add_row(sign, *texts, f"{row['score']:.4f}")
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None)
    table.add_column(first)
    for title in others:
        table.add_column(title, justify="right")
    return table


def _lines(texts: list[str], limit: int | None) -> None:
    for text in texts[:limit]:
        console.print(f"    {text}", soft_wrap=True)
    if limit is not None and len(texts) > limit:
        console.print(f"    ... and {len(texts) - limit} more")
