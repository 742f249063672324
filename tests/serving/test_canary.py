"""Who is served from the canary's version: its share, as long as it is not the older one."""

from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest

from conrec.serving.audience import released
from conrec.serving.canary import reader_for
from conrec.serving.reader import BlocklistReader
from conrec.store.publish import rollback

NOW = 1_700_000_000_000_000
DAY = 86_400_000_000
USERS = [f"user{number:03d}" for number in range(300)]


def one_row_each(item):
    """Everybody is not shown one item."""
    row = {"item_id": item, "reason": "predicted", "similarity": 0.5, "score": 0.25, "semantic_id": "<a_1><b_1>"}
    row |= {"demotes_at": NOW + 7 * DAY, "expires_at": NOW + 8 * DAY}
    return [row | {"user_id": user} for user in USERS]


@pytest.fixture
def publish(tmp_path, publish_unaudited):
    """Publishes a version under a pointer; returns its root."""

    def published(version, item, pointer, share, days=0.0):
        audience = {"holdout_share": 0.0, "release_share": share, "shadow": pointer == "shadow"}
        about = {"watermark_us": NOW + round(days * DAY), "audience": audience}
        return publish_unaudited(
            str(tmp_path / "store"), one_row_each(item), version=version, about=about, pointer=pointer
        )

    return published


def shown(root):
    """What each user is shown of both versions' items, and by which version."""
    clock = lambda: datetime.fromtimestamp(NOW / 1e6, UTC) + timedelta(hours=1)  # noqa: E731
    current, canary = BlocklistReader(root, "current", clock), BlocklistReader(root, "shadow", clock)
    readers = {user: reader_for(user, current, canary) for user in USERS}
    return {user: (reader.version, reader.filter(user, ["old", "new"])) for user, reader in readers.items()}


def test_a_share_is_served_from_the_canary_and_a_larger_one_contains_it(publish):
    publish("v1", "old", "current", 1.0)
    before = set()
    for number, share in enumerate((0.0, 0.1, 0.4, 1.0)):
        root = publish(f"canary{number}", "new", "shadow", share)
        found = shown(root)
        on = {user for user, (version, _) in found.items() if version == f"canary{number}"}
        assert on == {user for user, mask in zip(USERS, released(pa.array(USERS), share), strict=True) if mask}
        assert before <= on and all(found[user] == (f"canary{number}", ["old"]) for user in on)
        assert all(found[user] == ("v1", ["new"]) for user in {*USERS} - on)
        before = on
    assert len(before) == len(USERS)


def test_a_canary_of_a_night_before_that_of_the_others_ends(publish):
    publish("v1", "old", "current", 1.0, days=0.25)
    root = publish("canary", "new", "shadow", 0.5)
    assert {version for version, _ in shown(root).values()} == {"v1", "canary"}
    publish("canary2", "new", "shadow", 0.5, days=0.5)
    publish("v2", "old", "current", 1.0, days=1.0)
    assert {version for version, _ in shown(root).values()} == {"v2"}


def test_a_rollback_of_the_shadow_to_what_is_served_ends_a_canary_at_once(publish):
    publish("v1", "old", "current", 1.0)
    root = publish("canary", "new", "shadow", 0.5)
    rollback(root, "v1", "shadow")
    assert {version for version, _ in shown(root).values()} == {"v1"}
