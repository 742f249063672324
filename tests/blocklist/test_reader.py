"""Serving fails open for users and rows, and never takes a damaged version for an empty one."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conrec import storage
from conrec.blocklist import versions
from conrec.blocklist.publish import _write
from conrec.blocklist.reader import BlocklistReader
from conrec.errors import ArtefactError

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


ABOUT = {"watermark_us": NOW, "generated_users": 1, "failed_users": 0}


def point(root, version, digest, pointer="current"):
    versions.swap_pointer(versions.observe(root, pointer), version, digest)


@pytest.fixture
def publish(tmp_path, blocks_of):
    """Publishes rows without an audit, which would refuse some of them; returns the root."""

    def run(rows, version="v1", buckets=3, pointer="current", about=ABOUT):
        root = str(tmp_path / "store")
        manifest = _write(root, version, blocks_of(rows, [], buckets), about)
        point(root, version, versions.create_manifest(root, version, manifest), pointer)
        return root

    return run


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


NAMES = st.text(st.characters(codec="utf-8"), max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(NAMES, st.sets(NAMES, max_size=5), max_size=12),
    st.lists(st.tuples(NAMES, st.lists(NAMES, max_size=6)), max_size=5),
    st.integers(1, 5),
)
def test_filter_equals_a_dictionary_and_the_batch_equals_single_requests(blocks_of, blocked, requests, buckets):
    import tempfile

    rows = [row(user, item) for user, items in blocked.items() for item in sorted(items)]
    with tempfile.TemporaryDirectory() as root:
        point(root, "v", versions.create_manifest(root, "v", _write(root, "v", blocks_of(rows, [], buckets), ABOUT)))
        reader = BlocklistReader(root, clock=lambda: at(1))
    requests = requests + [(user, [*items, "other"]) for user, items in blocked.items()]
    users, candidates = [user for user, _ in requests], [items for _, items in requests]
    expected = [[item for item in items if item not in blocked.get(user, ())] for user, items in requests]
    assert reader.filter_batch(users, candidates) == expected
    assert [reader.filter(*request) for request in requests] == expected


def damage_file(root, change):
    entry = next(entry for entry in versions.read_manifest(root, "v2")[0]["files"] if entry["path"].startswith("data"))
    url = storage.join(versions.version_url(root, "v2"), entry["path"])
    storage.write_bytes(url, change(storage.read_bytes(url)))


def damage_manifest(root, change):
    url = storage.join(versions.version_url(root, "v2"), "manifest.json")
    storage.write_bytes(url, change(storage.read_bytes(url)))


def newer_schema(root):
    manifest, _ = versions.read_manifest(root, "v2")
    url = storage.join(versions.version_url(root, "v2"), "manifest.json")
    storage.write_json(url, {**manifest, "schema_version": 3})
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
        "from conrec.blocklist.reader import BlocklistReader\n"
        f"reader = BlocklistReader({root!r}, clock=lambda: datetime.fromtimestamp({NOW} / 1e6, UTC))\n"
        "import json\n"
        "modules = sorted({name.partition('.')[0] for name in set(sys.modules) - before})\n"
        "print(json.dumps([reader.filter('a', ['x', 'y']), modules]))\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    survivors, modules = json.loads(output)
    assert survivors == ["y"]
    assert not {"torch", "pydantic", "faiss", "scipy", "pandas"} & set(modules)
