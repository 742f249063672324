"""The code of docs/reading.md runs as it stands, and every consumer blocks the same."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from stores import redis_server

from conrec import storage
from conrec.buckets import bucket_of
from conrec.catalogue.codebook import format_semantic_ids
from conrec.serving.mirror import mirror
from conrec.serving.redis import export_redis

pytestmark = pytest.mark.long

DAY = 86_400_000_000
NOW = int(datetime.now(UTC).timestamp() * 1e6)
PAGE = Path(__file__).parents[2] / "docs" / "reading.md"


@pytest.fixture
def redis_url(tmp_path):
    with redis_server(tmp_path) as url:
        yield url


def test_every_consumer_blocks_the_same(world, tmp_path, monkeypatch, publish_unaudited, redis_url):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    items = [f"item{number}" for number in range(12)]
    # Past, fading and blocking rows, and a reason that nobody knows yet.
    rows = [
        {
            "user_id": f"user{number}",
            "item_id": items[item],
            "reason": ("explicit", "predicted", "weather")[rng.integers(3)],
            "similarity": 0.5,
            "score": 0.5,
            "semantic_id": None,
            "demotes_at": NOW + int(days) * DAY,
            "expires_at": NOW + int(days + rng.integers(3)) * DAY,
        }
        for number in range(30)
        for item, days in zip(rng.permutation(12)[:6], rng.choice([-3, -1, 2, 9], 6), strict=True)
    ]
    world.codebook.save("codebook.safetensors")
    times = {"demotes_at": NOW + DAY, "expires_at": NOW + DAY}
    rule = {"user_id": "user1", "semantic_id": format_semantic_ids(np.array([[1, 1]]))[0].as_py(), "score": 0.5}
    publish_unaudited(
        str(tmp_path / "blocklists"),
        rows,
        [{**rule, "threshold": 0.25, **times}],
        about={"codebook": storage.sha256("codebook.safetensors")},
    )
    mirror("blocklists", "mirror")
    export_redis("blocklists", redis_url, "conrec")
    blocks = [
        compile(code, "reading.md", "exec") for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    ]
    assert len(blocks) == 8
    seen = 0
    for user in [*(f"user{number}" for number in range(30)), "nobody"]:
        new_items = world.codebook.reconstruct(np.array([[1, 1], [2, 0]]))
        told = {"user": user, "candidates": items, "redis_url": redis_url, "new_items": new_items}
        for block in blocks:
            exec(block, told)
        expected = {
            r["item_id"] for r in rows if r["user_id"] == user and r["reason"] != "weather" and r["demotes_at"] > NOW
        }
        assert set(items) - set(told["survivors"]) == expected
        assert {row[0] for row in told["by_duckdb"]} == expected
        assert set(told["by_pyarrow"]["item_id"].to_pylist()) == expected
        assert set(told["blocked_in_redis"](user, items)) == expected
        assert {item for item, factor in zip(items, told["factors"], strict=True) if factor == 0} == expected
        assert told["blocked"].tolist() == [user == "user1", False]
        assert (told["changed"], told["alert"]) == (False, False)
        seen += len(expected)
        said = {item: ("rejected", "liked")[rng.integers(2)] for item in rng.permutation(items)[:6].tolist()}
        for item, kind in said.items():
            other = {"rejected": "liked", "liked": "rejected"}[kind]
            for told_kind in (other, kind):  # the last word counts
                told["heard"](user, item, told_kind, datetime.now(UTC))
                told["heard_in_redis"](user, item, told_kind)
        kept = [item for item in items if said.get(item, "rejected" if item in expected else "liked") == "liked"]
        assert told["shown"](user, items) == told["shown_by_redis"](user, items) == kept
        assert told["blocked_in_redis"](user, []) == told["shown_by_redis"](user, []) == []
        assert told["shard"] == f"{bucket_of(user, 16)}/16"
        told["refreshed"]()
        assert told["shown"](user, items) == kept
        for item, kind in said.items():
            told["heard"](user, item, kind, told["reader"].watermark - timedelta(days=4))
        told["refreshed"]()
        assert told["since"] == {} and told["shown"](user, items) == told["survivors"]
    assert seen > 30
