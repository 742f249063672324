"""Serving fails open for users and rows, and never takes a damaged version for an empty one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conrec import storage
from conrec.errors import ArtefactError
from conrec.hashing import stable_hash_of
from conrec.serving import versions
from conrec.serving.audience import in_holdout, released
from conrec.serving.lookup import Compiled
from conrec.serving.reader import BlocklistReader
from conrec.store import pointers

DAY = 86_400_000_000
NOW = 1_700_000_000_000_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def at(days):
    return EPOCH + timedelta(microseconds=NOW + round(days * DAY))


def row(user, item, reason="predicted", days=7.0, fades=0.0):
    """Blocks for `days`, then fades for `fades` days."""
    return {
        "user_id": user,
        "item_id": item,
        "reason": reason,
        "similarity": 0.5 if reason == "predicted" else 1.0,
        "score": 0.25 if reason == "predicted" else 1.0,
        "semantic_id": "<a_1><b_1>" if reason == "predicted" else None,
        "demotes_at": NOW + round(days * DAY),
        "expires_at": NOW + round((days + fades) * DAY),
    }


def point(root, version, digest, pointer="current"):
    pointers.swap_pointer(pointers.observe(root, pointer), version, digest)


@pytest.fixture
def publish(tmp_path, publish_unaudited):
    return lambda rows, version="v1", **options: publish_unaudited(
        str(tmp_path / "store"), rows, version=version, **options
    )


def test_blocked_items_are_dropped_and_the_order_kept(publish):
    root = publish([row("a", "x"), row("a", "y", "explicit", 80), row("b", "z")])
    reader = BlocklistReader(root, clock=lambda: at(1))
    assert reader.filter("a", ["z", "y", "q", "x", "z"]) == ["z", "q", "z"]
    assert reader.filter("b", ["z", "y", "x"]) == ["y", "x"]
    assert reader.filter("a", []) == []


@pytest.mark.parametrize("user", ["nobody", "", "A", "a ", "\ud800", "а", "b" * 10_000])  # the sixth is Cyrillic
def test_an_unknown_user_is_blocked_nothing(publish, user):
    reader = BlocklistReader(publish([row("a", "x"), row("b", "x")]), clock=lambda: at(1))
    assert reader.filter(user, ["x", "y"]) == ["x", "y"]
    assert reader.blocklist(user) == []
    assert reader.explain(user, "x") is None


def test_rows_end_when_they_expire(publish):
    now = at(6.99)
    reader = BlocklistReader(publish([row("a", "x"), row("a", "y", "explicit", 80)]), clock=lambda: now)
    assert reader.filter("a", ["x", "y"]) == []
    now = at(7)
    assert reader.filter("a", ["x", "y"]) == ["x"]
    assert reader.explain("a", "x") is None
    now = at(80)
    assert reader.filter("a", ["x", "y"]) == ["x", "y"]
    assert [blocked.item_id for blocked in reader.blocklist("a")] == ["x", "y"]


def test_a_reason_of_a_later_release_blocks_nothing(publish):
    reader = BlocklistReader(publish([row("a", "x", "weather"), row("a", "y")]), clock=lambda: at(1))
    assert reader.filter("a", ["x", "y"]) == ["x"]
    assert reader.explain("a", "x") is None


def test_a_row_blocks_then_fades_then_ends(publish):
    now = at(1)
    rows = [row("a", "x", days=7, fades=4), row("a", "y", "explicit", 30), row("a", "z", "weather", 7, 4)]
    reader = BlocklistReader(publish(rows), clock=lambda: now)
    candidates = ["z", "x", "other", "y", "x"]
    expected = {1: [1, 0, 1, 0, 0], 7: [1, 0, 1, 0, 0], 8: [1, 0.25, 1, 0, 0.25], 10: [1, 0.75, 1, 0, 0.75]}
    expected |= {11: [1, 1, 1, 0, 1], 30: [1, 1, 1, 1, 1]}
    for days, multipliers in expected.items():
        now = at(days)
        assert reader.multipliers("a", candidates).tolist() == multipliers
        # At the very moment when x stops to block its factor is still 0.
        shown = [factor > 0 or (days, item) == (7, "x") for item, factor in zip(candidates, multipliers, strict=True)]
        assert reader.filter("a", candidates) == [item for item, here in zip(candidates, shown, strict=True) if here]
    now = at(8)
    assert reader.explain("a", "x").demotes_at == at(7)
    now = at(11)
    assert reader.explain("a", "x") is None
    assert reader.multipliers("nobody", candidates).tolist() == [1, 1, 1, 1, 1]
    assert reader.multipliers("a", []).shape == (0,)


def test_of_two_rows_of_an_item_the_stronger_acts(publish):
    rows = [row("a", "x", days=7, fades=4), row("a", "x", "explicit", 30), row("a", "x", days=2, fades=8)]
    reader = BlocklistReader(publish(rows), clock=lambda: at(8))
    assert reader.multipliers("a", ["x"]).tolist() == [0]
    assert reader.filter("a", ["x"]) == []


def test_what_happened_since_the_night_acts_at_once(publish):
    reader = BlocklistReader(publish([row("alice", item) for item in ("a", "b", "c")]), clock=lambda: at(0))
    candidates = ["d", "a", "b", "c", "e"]
    for user, listed in (("alice", {"a", "b", "c"}), ("nobody", set())):
        for rejected in ([], ["e"], ["c", "e"]):
            for liked in ([], ["d"], ["b", "c"]):
                kept = [item for item in candidates if item in liked or item not in {*listed, *rejected}]
                assert reader.filter(user, candidates, rejected, liked) == kept
                factors = reader.multipliers(user, candidates, rejected, liked)
                assert factors.tolist() == [float(item in kept) for item in candidates]
    assert reader.filter("alice", candidates) == ["d", "e"]  # nothing is remembered


def test_explain_names_the_id_that_caught_it(publish):
    reader = BlocklistReader(publish([row("a", "x"), row("a", "y", "explicit", 80)]), clock=lambda: at(1))
    predicted, explicit = reader.explain("a", "x"), reader.explain("a", "y")
    assert (predicted.reason, predicted.semantic_id, predicted.similarity) == ("predicted", "<a_1><b_1>", 0.5)
    assert predicted.expires_at == at(7)
    assert (explicit.reason, explicit.semantic_id) == ("explicit", None)
    assert reader.explain("a", "z") is None


def test_age_and_watermark(publish):
    reader = BlocklistReader(publish([row("a", "x")]))
    assert timedelta(0) <= reader.age() < timedelta(minutes=1)
    assert reader.watermark == at(0)


def test_a_reader_stays_with_its_version_until_it_refreshes(publish):
    root = publish([row("a", "x")])
    reader = BlocklistReader(root, clock=lambda: at(1))
    assert reader.refresh() is False
    publish([row("a", "y")], "v2")
    assert (reader.version, reader.filter("a", ["x", "y"])) == ("v1", ["y"])
    assert reader.refresh() is True
    assert (reader.version, reader.filter("a", ["x", "y"])) == ("v2", ["x"])


def test_each_pointer_is_its_own(publish):
    root = publish([row("a", "x")])
    with pytest.raises(ArtefactError, match=r"SHADOW\.json"):
        BlocklistReader(root, "shadow")
    publish([row("a", "y")], "v2", pointer="shadow")
    shadow, current = (BlocklistReader(root, name, clock=lambda: at(1)) for name in ("shadow", "current"))
    assert (shadow.version, shadow.filter("a", ["x", "y"])) == ("v2", ["x"])
    assert (current.version, current.filter("a", ["x", "y"])) == ("v1", ["y"])
    with pytest.raises(ArtefactError, match="'old' is unknown"):
        BlocklistReader(root, "old")


def test_a_named_version_is_read_whatever_the_pointers_say(publish, tmp_path):
    root = publish([row("a", "x")])
    publish([row("a", "y")], "v2")
    storage.remove(storage.join(root, "CURRENT.json"))
    reader = BlocklistReader(root, clock=lambda: at(1), version="v1")
    assert (reader.version, reader.filter("a", ["x", "y"])) == ("v1", ["y"])
    point(root, "v2", versions.read_manifest(root, "v2")[1])
    assert not reader.refresh()
    assert (reader.version, reader.filter("a", ["x", "y"])) == ("v1", ["y"])


def test_a_named_version_that_is_not_complete_is_refused_with_those_that_are(publish):
    root = publish([row("a", "x")])
    publish([row("a", "x")], "v2")
    storage.write_bytes(storage.join(root, "versions", "v3", "data", "stray.parquet"), b"PAR1")
    for name in ("v3", "v4"):
        with pytest.raises(ArtefactError, match=rf"versions/{name}: no complete version; there is: v2, v1$"):
            BlocklistReader(root, version=name)
    with pytest.raises(ArtefactError, match="is not the name of a version"):
        BlocklistReader(root, version="../v1")


def test_a_named_version_that_is_damaged_is_an_error(publish):
    root = publish([row("a", "x")])
    publish([row("a", "x")], "v2")
    storage.write_bytes(storage.join(root, "versions", "v1", "data", "bucket-00000.parquet"), b"PAR1")
    with pytest.raises(ArtefactError, match="damaged"):
        BlocklistReader(root, version="v1")


def test_holdout_and_release_are_those_of_the_version(publish):
    users = [f"user{number}" for number in range(200)]
    root = publish([row("a", "x")], about={"audience": {"holdout_share": 0.2, "release_share": 0.5, "shadow": False}})
    reader = BlocklistReader(root)
    held, reached = in_holdout(pa.array(users), 0.2).tolist(), released(pa.array(users), 0.5).tolist()
    assert [reader.in_holdout(user) for user in users] == held
    assert [reader.released(user) for user in users] == reached
    assert 0 < sum(held) < 100 < 50 + sum(reached)
    assert reader.about["audience"]["shadow"] is False
    everybody = BlocklistReader(publish([row("a", "x")], "v2"))
    assert not any(map(everybody.in_holdout, users)) and all(map(everybody.released, users))


def test_a_request_reads_nothing(publish, tmp_path):
    reader = BlocklistReader(publish([row("a", "x")]), clock=lambda: at(1))
    shutil.rmtree(tmp_path / "store")
    assert reader.filter("a", ["x", "y"]) == ["y"]
    assert reader.explain("a", "x").score == 0.25


def test_the_background_picks_up_a_version_and_outlives_a_damaged_one(publish, caplog):
    root = publish([row("a", "x")])
    reader = BlocklistReader(root, clock=lambda: at(1), refresh_every=timedelta(milliseconds=5))
    publish([row("a", "y")], "v2")
    wait_for(lambda: reader.version == "v2")
    storage.write_bytes(storage.join(root, "CURRENT.json"), b"{")
    wait_for(lambda: "goes on with version v2" in caplog.text)
    assert reader.filter("a", ["x", "y"]) == ["x"]
    publish([row("a", "z")], "v4")
    wait_for(lambda: reader.version == "v4")
    reader.close()
    time.sleep(0.05)
    publish([row("a", "x")], "v5")
    time.sleep(0.05)
    assert reader.version == "v4"


@pytest.mark.long
def test_requests_see_one_version_while_others_take_its_place(publish):
    """Each version blocks its own half for every user: a torn answer would be neither."""
    users = [f"user{number}" for number in range(50)]
    halves = {"v0": "even", "v1": "odd"}
    root = publish([row(user, halves["v0"]) for user in users], "v0")
    publish([row(user, halves["v1"]) for user in users], "v1")
    digests = {name: versions.read_manifest(root, name)[1] for name in halves}
    reader = BlocklistReader(root, clock=lambda: at(1))
    stop, wrong, answers = threading.Event(), [], [0] * 3

    def ask(thread):
        while not stop.is_set():
            batch = reader.filter_batch(users, [["even", "odd"]] * len(users))
            answers[thread] += len(users)
            if batch not in ([["odd"]] * len(users), [["even"]] * len(users)):
                wrong.append(batch)

    threads = [threading.Thread(target=ask, args=(thread,)) for thread in range(3)]
    changes, turn = 0, sys.getswitchinterval()
    # Or a change would wait for a turn of every thread at every call of the file system.
    sys.setswitchinterval(turn / 20)
    for thread in threads:
        thread.start()
    while sum(answers) < 10_000 or changes < 20:
        name = f"v{changes % 2}"
        point(root, name, digests[name])
        changes += reader.refresh()
    stop.set()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(turn)
    assert wrong == []
    assert changes >= 20


def test_users_of_one_hash_are_told_apart():
    """No two texts of equal hash are at hand, so the arrays say that they are."""
    value = np.array([stable_hash_of("b")], np.uint64).view(np.int64)[0]
    # Hash, id, rows, text of blocked items and its end in time; the last record says where the third user ends.
    users = [[value, 0, 0, 0, 0], [value, 1, 2, 0, 0], [value, 2, 5, 0, 0], [0, 4, 9, 0, 0]]
    arrays = {
        "bucket_users": np.array([0, 3]),
        "users": np.array(users, np.int64).ravel(),
        "user_bytes": np.frombuffer(b"abbb", np.uint8),
    }
    assert Compiled(arrays).rows("b") == slice(2, 5)
    assert Compiled({**arrays, "user_bytes": np.frombuffer(b"acbb", np.uint8)}).rows("b") == slice(0, 0)


def test_times_that_are_all_different_and_equal_ones_come_back_exactly(publish):
    rows = [
        row(f"user{n % 7}", f"item{n}", ("explicit", "predicted")[n % 2], n % 5 + n * 1e-6, n % 3) for n in range(99)
    ]
    reader = BlocklistReader(publish(rows))
    expected = sorted((r["user_id"], r["item_id"], r["reason"], r["demotes_at"], r["expires_at"]) for r in rows)
    microseconds = lambda moment: (moment - EPOCH) // timedelta(microseconds=1)  # noqa: E731
    assert expected == sorted(
        (f"user{n}", found.item_id, found.reason, microseconds(found.demotes_at), microseconds(found.expires_at))
        for n in range(7)
        for found in reader.blocklist(f"user{n}")
    )


NAMES = st.text(st.characters(codec="utf-8"), max_size=6) | st.sampled_from(["", "a", "b", "\x1f", "a\x1fb"])
ACTS, ENDED, UNKNOWN = ("predicted", 7.0), ("explicit", 0.5), ("weather", 7.0)


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        NAMES, st.dictionaries(NAMES, st.sampled_from([ACTS, ACTS, ENDED, UNKNOWN]), max_size=5), max_size=12
    ),
    st.lists(st.tuples(NAMES, st.lists(NAMES, max_size=6)), max_size=5),
    st.integers(1, 5),
)
def test_filter_equals_a_dictionary_and_the_batch_equals_single_requests(publish_unaudited, listed, requests, buckets):
    """A day later: users all of whose rows act, some of whose rows ended, and with reasons that nobody knows."""
    import tempfile

    rows = [row(user, item, *listed[user][item]) for user in listed for item in sorted(listed[user])]
    with tempfile.TemporaryDirectory() as root:
        publish_unaudited(root, rows, buckets=buckets)
        reader = BlocklistReader(root, clock=lambda: at(1))
    requests = requests + [(user, [*items, "other"]) for user, items in listed.items()]
    blocked = {user: [item for item in items if items[item] is ACTS] for user, items in listed.items()}
    users, candidates = [user for user, _ in requests], [items for _, items in requests]
    expected = [[item for item in items if item not in blocked.get(user, ())] for user, items in requests]
    assert reader.filter_batch(users, candidates) == expected
    assert [reader.filter(*request) for request in requests] == expected


def wait_for(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def damage_file(root, change, version="v2"):
    entry = next(entry for entry in versions.read_manifest(root, version)[0]["files"] if "data/" in entry["path"])
    url = storage.join(versions.version_url(root, version), entry["path"])
    storage.write_bytes(url, change(storage.read_bytes(url)))


def damage_manifest(root, change):
    url = storage.join(versions.version_url(root, "v2"), "manifest.json")
    storage.write_bytes(url, change(storage.read_bytes(url)))


def newer_schema(root):
    manifest, _ = versions.read_manifest(root, "v2")
    url = storage.join(versions.version_url(root, "v2"), "manifest.json")
    storage.write_json(url, {**manifest, "schema_version": 4})
    point(root, "v2", storage.sha256(url))


def replace_a_table(root, change):
    """With a manifest that agrees: what only a writer that is wrong leaves."""
    manifest, _ = versions.read_manifest(root, "v2")
    entry = next(entry for entry in manifest["files"] if entry["path"] == "data/bucket-00000.parquet")
    url = storage.join(versions.version_url(root, "v2"), entry["path"])
    storage.write_table(change(storage.read_table(url)), url)
    entry["bytes"], entry["sha256"] = storage.size(url), storage.sha256(url)
    url = storage.join(versions.version_url(root, "v2"), "manifest.json")
    storage.write_json(url, manifest)
    point(root, "v2", storage.sha256(url))


def without_a_file(root):
    manifest, _ = versions.read_manifest(root, "v2")
    url = storage.join(versions.version_url(root, "v2"), "manifest.json")
    storage.write_json(url, {**manifest, "files": []})
    point(root, "v2", storage.sha256(url))


def outside_the_version(root):
    manifest, _ = versions.read_manifest(root, "v2")
    url = storage.join(versions.version_url(root, "v2"), "manifest.json")
    manifest["files"][0]["path"] = "data/../../v1/data/bucket-00000.parquet"
    storage.write_json(url, manifest)
    point(root, "v2", storage.sha256(url))


USER = pa.field("user_id", pa.string(), nullable=False)


def strangers(count):
    return [f"stranger{number}" for number in range(count)]


def flip(data):
    return data[:50] + bytes([data[50] ^ 1]) + data[51:]


# What happens to version v2, and what the message names, so that each check is seen to catch its own damage.
DAMAGE = {
    "a flipped byte in data": (lambda root: damage_file(root, flip), "SHA-256"),
    "a truncated file": (lambda root: damage_file(root, lambda data: data[:-3]), "bytes, the manifest says"),
    "an emptied file": (lambda root: damage_file(root, lambda data: b""), "0 bytes, the manifest says"),
    "a flipped byte in the manifest": (
        lambda root: damage_manifest(root, lambda data: data.replace(b'"rows": ', b'"rows": 1', 1)),
        "SHA-256 .*, the pointer says",
    ),
    "a truncated manifest": (lambda root: damage_manifest(root, lambda data: data[:200]), "the pointer says"),
    "a manifest of a later release": (newer_schema, "install a newer conrec"),
    "a manifest without the files": (without_a_file, "names no data/bucket-00000.parquet"),
    "a manifest that points outside": (outside_the_version, "fields are missing"),
    "users that do not ascend": (
        lambda root: replace_a_table(root, lambda table: table.take(list(range(len(table)))[::-1])),
        "users are not ascending",
    ),
    "a user in another bucket": (
        lambda root: replace_a_table(root, lambda table: table.set_column(0, USER, [strangers(len(table))])),
        "a user of another bucket",
    ),
    "a row less than the manifest says": (
        lambda root: replace_a_table(root, lambda table: table.slice(1)),
        "rows; roll back",
    ),
    "a column of another type": (
        lambda root: replace_a_table(root, lambda table: table.drop_columns(["score"])),
        "column score is missing",
    ),
    "a pointer that is no JSON": (
        lambda root: storage.write_bytes(storage.join(root, "CURRENT.json"), b"{"),
        "not JSON",
    ),
    "a pointer to nowhere": (
        lambda root: point(root, "v9", "0" * 64),
        "has no manifest",
    ),
    "a pointer outside the root": (
        lambda root: point(root, "../x", "0" * 64),
        "names no version",
    ),
    "a pointer without a version": (
        lambda root: storage.write_json(storage.join(root, "CURRENT.json"), {}),
        "names no version",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_version_is_an_error_and_the_last_good_one_stays(publish, damage):
    rows = [row(f"user{number}", "x") for number in range(20)]
    root = publish(rows)
    reader = BlocklistReader(root, clock=lambda: at(1))
    publish(rows, "v2")
    inflict, message = DAMAGE[damage]
    inflict(root)
    with pytest.raises(ArtefactError, match=message):
        BlocklistReader(root)
    with pytest.raises(ArtefactError, match=message):
        reader.refresh()
    assert reader.version == "v1"
    assert reader.filter("user3", ["x", "y"]) == ["y"]


def test_nothing_published_is_an_error(tmp_path):
    with pytest.raises(ArtefactError, match="run the nightly job"):
        BlocklistReader(str(tmp_path))


@pytest.mark.long
def test_the_reader_needs_only_pyarrow_fsspec_and_numpy(publish):
    root = publish([row("a", "x")])
    code = (
        "import sys\n"
        "from importlib.metadata import packages_distributions\n"
        "refused = set(packages_distributions()) - {'pyarrow', 'fsspec', 'numpy', 'conrec'}\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in refused:\n"
        "            raise ImportError(name)\n"
        "before = set(sys.modules)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from datetime import UTC, datetime\n"
        "from conrec.serving.reader import BlocklistReader\n"
        f"reader = BlocklistReader({root!r}, clock=lambda: datetime.fromtimestamp({NOW} / 1e6, UTC))\n"
        "import json\n"
        "modules = sorted({name.partition('.')[0] for name in set(sys.modules) - before})\n"
        "print(json.dumps([reader.filter('a', ['x', 'y']), modules]))\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    survivors, modules = json.loads(output)
    assert survivors == ["y"]
    assert not {"torch", "pydantic", "faiss", "scipy", "pandas"} & set(modules)
