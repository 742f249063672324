"""A tiny world: 12 items on 9 semantic IDs of two levels, and a way to write down what users did."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from nights import ABOUT, DAY, NOW, USERS

from conrec.buckets import user_buckets
from conrec.catalogue.codebook import Codebook, format_semantic_ids
from conrec.catalogue.trie import Trie
from conrec.config import GuardrailSettings, PublishSettings
from conrec.feedback.events import Events
from conrec.store import pointers
from conrec.store.audit import Expected
from conrec.store.compiled import with_compiled
from conrec.store.publish import Block, publish, write_version
from conrec.tables import BLOCKLIST, RULES


@dataclass(frozen=True)
class World:
    item_ids: pa.Array
    trie: Trie
    codebook: Codebook


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Waiting for the disk, and for threads to share ten rows, would be most of the time of these tests."""
    threads = pa.cpu_count()
    pa.set_cpu_count(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield
    pa.set_cpu_count(threads)


@pytest.fixture(scope="session")
def world() -> World:
    rng = np.random.default_rng(3)
    semantic_ids = np.array([[a, b] for a in range(3) for b in range(3)] + [[0, 0], [1, 1], [1, 1]])
    # A large first level and a small second one: IDs with the same first code are near each other.
    codewords = rng.normal(size=(2, 3, 6)).astype(np.float32) * np.array([1, 0.3], np.float32)[:, None, None]
    center = codewords[np.arange(2), semantic_ids].sum(axis=1).mean(axis=0)
    item_ids = pa.array([f"item{row:02d}" for row in range(len(semantic_ids))])
    return World(item_ids, Trie.build(semantic_ids, 3), Codebook(codewords, center))


@pytest.fixture(scope="session")
def make_events() -> Callable[[dict[str, Iterable[tuple[int, str, float]]]], Events]:
    """From {user: [(item row, kind, days before NOW)]}."""

    def make(histories: dict[str, Iterable[tuple[int, str, float]]]) -> Events:
        users = sorted(histories)
        sorted_rows = [sorted(histories[user], key=lambda event: -event[2]) for user in users]
        flat = [event for rows in sorted_rows for event in rows]
        return Events(
            users=pa.array(users, pa.string()),
            offsets=np.concatenate(([0], np.cumsum([len(rows) for rows in sorted_rows], dtype=np.int64))).astype(
                np.int64
            ),
            items=np.array([item for item, _, _ in flat], np.int32),
            times=np.array([NOW - round(days * DAY) for _, _, days in flat], np.int64),
            kinds=np.array([("rejected", "liked", "shown").index(kind) for _, kind, _ in flat], np.int8),
        )

    return make


@pytest.fixture(scope="session")
def blocks_of() -> Callable[[list[dict[str, Any]], list[dict[str, Any]], int], list[Block]]:
    """Item rows and rules as dictionaries -> one block per bucket, sorted by user; times in microseconds.

    Without `demotes_at` a row ends as it expires, undemoted.
    """

    def make(items: list[dict[str, Any]], rules: list[dict[str, Any]], buckets: int) -> list[Block]:
        tables = []
        for rows, schema in ((items, BLOCKLIST), (rules, RULES)):
            columns = [
                pa.array([row.get(field.name, row["expires_at"]) for row in rows], _written(field.type))
                if field.name == "demotes_at"
                else pa.array([row[field.name] for row in rows], _written(field.type))
                for field in schema
            ]
            table = pa.table(
                [column.cast(field.type) for column, field in zip(columns, schema, strict=True)], schema=schema
            )
            tables.append(table.sort_by("user_id"))
        places = [user_buckets(table["user_id"].combine_chunks(), buckets) for table in tables]
        return [
            Block(
                bucket, *(table.filter(pa.array(place == bucket)) for table, place in zip(tables, places, strict=True))
            )
            for bucket in range(buckets)
        ]

    return make


@pytest.fixture(scope="session")
def publish_unaudited(blocks_of: Callable[..., list[Block]]) -> Callable[..., str]:
    """Publishes item rows and rules without an audit, which would refuse some of them; returns the root."""

    def run(
        root: str,
        rows: list[dict[str, Any]],
        rules: list[dict[str, Any]] = (),
        version: str = "v1",
        buckets: int = 3,
        pointer: str = "current",
        about: dict[str, Any] | None = None,
        compiled: bool = False,
    ) -> str:
        told = {"watermark_us": NOW, "generated_users": 1, "failed_users": 0, **(about or {})}
        manifest = write_version(root, version, blocks_of(list(rows), list(rules), buckets), told)
        if compiled:
            manifest = with_compiled(root, manifest, lambda: None)
        digest = pointers.create_manifest(root, version, manifest)
        pointers.swap_pointer(pointers.observe(root, pointer), version, digest)
        return root

    return run


def _written(kind: pa.DataType) -> pa.DataType:
    return pa.int64() if pa.types.is_timestamp(kind) else kind


@pytest.fixture
def night(world, make_events, blocks_of):
    """publish(root, version) of a night in which every user rejected items 0 to `rejected` - 1."""
    events = make_events({user: [(item, "rejected", 1) for item in range(3)] for user in USERS})
    expected = Expected(
        events=events,
        item_ids=world.item_ids,
        semantic_ids=format_semantic_ids(world.trie.semantic_ids),
        watermark_us=NOW,
        input_users=6,
        guardrails=GuardrailSettings(max_catalogue_share=1.0),
        publish=PublishSettings(holdout_share=0.0),
    )

    def run(root, version, rejected, about=ABOUT, buckets=2, pointer="current"):
        now = about["watermark_us"]
        rows = [
            {
                "user_id": user,
                "item_id": f"item{item:02d}",
                "reason": "explicit",
                "similarity": 1.0,
                "score": 1.0,
                "semantic_id": None,
                "expires_at": now + 89 * DAY,
            }
            for user in USERS
            for item in range(rejected)
        ]
        rule = {"semantic_id": "<a_1><b_1>", "score": 0.9, "threshold": 0.8}
        rule |= {"demotes_at": now + 7 * DAY, "expires_at": now + 14 * DAY}
        rules = [{"user_id": user, **rule} for user in USERS]
        tonight = replace(expected, watermark_us=now)
        return publish(root, version, blocks_of(rows, rules, buckets), lambda: about, tonight, pointer)

    return run
