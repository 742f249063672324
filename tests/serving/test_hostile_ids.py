"""Ids that attack come back from a published night exactly as they went in, and nothing lies outside the root."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pytest
from nights import COUNTED, NOW, calibration_of, opened, ranking_of, write_generated

from conrec.blocklist.night import night
from conrec.blocklist.resolve import leaf_vectors
from conrec.catalogue.codebook import format_semantic_ids
from conrec.config import GuardrailSettings, PublishSettings
from conrec.serving.mirror import mirror
from conrec.store.audit import Expected
from conrec.store.publish import publish

HOSTILE = [
    "../../escape",
    "/etc/passwd",
    "C:\\windows",
    "line\nbreak\r\n",
    "nul\0inside",
    " spaces ",
    "a" * 1024,
    "аlice",  # Cyrillic a
    "alice",
    "e\u0301",
    "\u00e9",
    "\u202eright to left",
]


@pytest.fixture
def reader_of(world, make_events, tmp_path):
    """Publishes a night in which every hostile user rejected item 0, all items with hostile ids; opens a reader."""
    names = sorted(HOSTILE)
    items = replace(world, item_ids=pa.array(names))
    events = make_events({user: [(0, "rejected", 1)] for user in HOSTILE})
    generated, root = str(tmp_path / "generated"), str(tmp_path / "store" / "blocklists")
    write_generated(generated, {user: [0, 4] for user in names})
    limits = GuardrailSettings(max_catalogue_share=1.0, min_history=1)
    settings = PublishSettings(holdout_share=0.0)
    calibration = calibration_of(COUNTED, COUNTED)
    ranked = (items.item_ids, ranking_of(items, events), leaf_vectors(items.codebook, items.trie), 0.8)
    with night([generated], events, *ranked, calibration, NOW, limits, settings) as tonight:
        expected = Expected(
            events=events,
            item_ids=items.item_ids,
            semantic_ids=format_semantic_ids(items.trie.semantic_ids),
            watermark_us=NOW,
            input_users=len(HOSTILE),
            guardrails=limits,
            publish=settings,
        )
        publish(root, "v1", tonight.blocks(), tonight.about, expected)
    return root, names


@pytest.mark.parametrize("mirrored", [False, True])
def test_hostile_ids_are_stored_and_returned_exactly(reader_of, tmp_path, mirrored):
    root, names = reader_of
    if mirrored:
        mirror(root, str(tmp_path / "mirror"))
    reader = opened(str(tmp_path / "mirror") if mirrored else root)
    for user in names:
        rows = {row.item_id: row.reason for row in reader.blocklist(user)}
        # Leaf 0 holds items 0 and 9, leaf 4 items 4, 10 and 11; item 0 they rejected themselves.
        assert rows == {names[0]: "explicit"} | {names[item]: "predicted" for item in (4, 9, 10, 11)}
        assert reader.filter(user, names) == [name for name in names if name not in rows]
    # What only looks like a user is nobody.
    for stranger in ("alicе", "e", "../../escape/", "nul", "a" * 1023):
        assert reader.filter(stranger, names) == names
    outside = {path.name for path in tmp_path.iterdir()} - {"generated", "store", "mirror"}
    assert not outside
    assert {path.name for path in (tmp_path / "store").iterdir()} == {"blocklists"}
