"""Whatever fails while publishing, a reader sees the old version or the new one, and running again converges."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
from itertools import count

import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from conrec import storage
from conrec.blocklist import versions
from conrec.blocklist.audit import Expected
from conrec.blocklist.publish import publish, rollback
from conrec.blocklist.reader import BlocklistReader
from conrec.catalogue.codebook import format_semantic_ids
from conrec.config import GuardrailSettings, PublishSettings
from conrec.errors import ArtefactError, AuditError, PublishError

DAY = 86_400_000_000
NOW = 1_700_000_000_000_000
USERS = [f"user{number}" for number in range(6)]
ABOUT = {"watermark_us": NOW, "generated_users": 6, "failed_users": 0}


@pytest.fixture(params=["memory", "local"])
def root(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "blocklists")
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    return "memory://blocklists"


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
        publish=PublishSettings(),
    )

    def run(root, version, rejected, about=ABOUT, buckets=2):
        rows = [
            {
                "user_id": user,
                "item_id": f"item{item:02d}",
                "reason": "explicit",
                "similarity": 1.0,
                "score": 1.0,
                "semantic_id": None,
                "expires_at": NOW + 89 * DAY,
            }
            for user in USERS
            for item in range(rejected)
        ]
        rule = {"semantic_id": "<a_1><b_1>", "score": 0.1, "theta": 0.9}
        rule |= {"demotes_at": NOW + 7 * DAY, "expires_at": NOW + 14 * DAY}
        rules = [{"user_id": user, **rule} for user in USERS]
        return publish(root, version, blocks_of(rows, rules, buckets), about, expected)

    return run


def content(root):
    reader = BlocklistReader(root)
    return reader.version, {user: [row.item_id for row in reader.blocklist(user)] for user in USERS}


def rejected_by_all(number):
    return {user: [f"item{item:02d}" for item in range(number)] for user in USERS}


OLD, NEW = ("v1", rejected_by_all(1)), ("v2", rejected_by_all(2))

LOCAL_OPERATIONS = [
    (os, name) for name in ("replace", "link", "unlink", "remove", "makedirs", "fsync", "chmod", "fdopen")
] + [(tempfile, "mkstemp")]
READS = ("cat_file", "find", "exists", "isdir", "info", "rm_file")


class Faults:
    """Fails the operation with a given number, before or after doing it; `dies`: every later one fails as well."""

    def __init__(self, position, after, dies):
        self.position, self.after, self.dies = position, after, dies
        self.seen = self.depth = 0

    @property
    def struck(self):
        return self.seen > self.position

    def around(self, operation):
        @functools.wraps(operation)
        def wrapped(*args, **kwargs):
            if self.depth:
                return operation(*args, **kwargs)
            number, self.seen = self.seen, self.seen + 1
            if (number == self.position and not self.after) or (self.dies and number > self.position):
                raise OSError(f"injected before {operation.__name__}")
            self.depth += 1
            try:
                result = operation(*args, **kwargs)
            finally:
                self.depth -= 1
            if number == self.position:
                raise OSError(f"injected after {operation.__name__}")
            return result

        return wrapped


def inject(patch, faults, root):
    files = MemoryFileSystem if root.startswith("memory") else LocalFileSystem
    operations = [(files, name) for name in READS]
    operations += [(files, "pipe_file")] if files is MemoryFileSystem else LOCAL_OPERATIONS
    for owner, name in operations:
        patch.setattr(owner, name, faults.around(getattr(owner, name)))


def empty(root):
    files, path = storage.filesystem(root)
    if files.exists(path):
        files.rm(path, recursive=True)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("dies", [False, True])
def test_a_failure_at_every_operation(root, night, after, dies):
    kept = replaced = 0
    for position in count():
        empty(root)
        night(root, "v1", 1)
        faults = Faults(position, after, dies)
        with pytest.MonkeyPatch.context() as patch:
            inject(patch, faults, root)
            with contextlib.suppress(OSError, AuditError, ArtefactError, PublishError):
                night(root, "v2", 2)
        if not faults.struck:
            break
        seen = content(root)
        assert seen in (OLD, NEW), position
        kept, replaced = kept + (seen == OLD), replaced + (seen == NEW)

        night(root, "v2", 2)
        assert content(root) == NEW, position
        manifest, _ = versions.read_manifest(root, "v2")
        named = {entry["path"] for entry in manifest["files"]} | {"manifest.json"}
        assert set(storage.list_files(versions.version_url(root, "v2"))) == named
    assert content(root) == NEW
    assert kept > 10
    assert replaced > 0 or not after


def test_a_failed_audit_leaves_the_pointer_and_says_what_and_where(root, night):
    night(root, "v1", 1)
    with pytest.raises(AuditError, match=r"reason: data/bucket-0000.\.parquet: explicit without a rejection.*item03"):
        night(root, "v2", 4)
    assert content(root) == OLD
    assert versions.read_manifest(root, "v2") is None
    night(root, "v2", 2)
    assert content(root) == NEW


def test_the_first_failed_night_publishes_nothing(root, night):
    with pytest.raises(AuditError):
        night(root, "v1", 1, {**ABOUT, "failed_users": 3})
    with pytest.raises(ArtefactError, match="nothing is published"):
        BlocklistReader(root)


def test_a_complete_version_is_never_written_again(root, night):
    night(root, "v1", 1)
    before = {name: storage.read_bytes(storage.join(root, name)) for name in storage.list_files(root)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "write_bytes", lambda *_: pytest.fail("written"))
        night(root, "v1", 1)
    assert before == {name: storage.read_bytes(storage.join(root, name)) for name in storage.list_files(root)}


def test_a_version_with_another_night_in_it_is_refused(root, night):
    night(root, "v1", 1)
    with pytest.raises(ArtefactError, match=r"another night \(different: failures\)"):
        night(root, "v1", 2, {**ABOUT, "failures": ["x"]})
    assert content(root) == OLD


def test_a_damaged_complete_version_is_not_pointed_at(root, night):
    night(root, "v2", 2)
    night(root, "v1", 1)
    entry = versions.read_manifest(root, "v2")[0]["files"][0]
    url = storage.join(versions.version_url(root, "v2"), entry["path"])
    storage.write_bytes(url, storage.read_bytes(url)[:-1])
    for attempt in (lambda: night(root, "v2", 2), lambda: rollback(root, "v2")):
        with pytest.raises(ArtefactError, match="bytes, the manifest says"):
            attempt()
        assert content(root) == OLD


def test_rollback_points_at_the_older_version(root, night):
    night(root, "v1", 1)
    night(root, "v2", 2)
    rollback(root, "v1")
    assert content(root) == OLD
    assert versions.read_pointer(root)["previous"] == "v2"
    for unknown in ("v3", "../v1", "/etc", ""):
        with pytest.raises(ArtefactError):
            rollback(root, unknown)
    assert content(root) == OLD


def test_a_damaged_pointer_is_mended_by_rollback(root, night):
    night(root, "v1", 1)
    storage.write_bytes(storage.join(root, "CURRENT.json"), b'{"version": ')
    with pytest.raises(ArtefactError, match="damaged"):
        BlocklistReader(root)
    rollback(root, "v1")
    assert content(root) == OLD


def test_leftovers_of_an_interrupted_run_with_other_buckets_are_removed(root, night):
    for name in ("data/bucket-00007.parquet", "rules/bucket-00007.parquet"):
        storage.write_bytes(storage.join(root, "versions", "v1", name), b"left over")
    night(root, "v1", 1)
    assert content(root) == OLD
    assert not [name for name in storage.list_files(root) if "00007" in name]


def test_the_manifest_is_created_exclusively(root, night):
    manifest = night(root, "v1", 1)
    before = versions.read_manifest(root, "v1")
    with pytest.raises(PublishError, match="another publisher"):
        versions.create_manifest(root, "v1", {**manifest, "published_at": "2020-01-01T00:00:00+00:00"})
    assert versions.read_manifest(root, "v1") == before


def test_the_manifest_names_every_file_with_rows_bytes_and_digest(root, night):
    manifest = night(root, "v1", 1)
    assert manifest["buckets"] == 2
    assert len(manifest["files"]) == 4
    for entry in manifest["files"]:
        url = storage.join(versions.version_url(root, "v1"), entry["path"])
        assert entry["sha256"] == storage.sha256(url)
        assert entry["bytes"] == storage.size(url)
        assert entry["rows"] == len(storage.read_table(url))
    assert manifest["figures"]["users"] == 6
    assert json.loads(storage.read_bytes(storage.join(root, "versions", "v1", "manifest.json"))) == manifest


@pytest.mark.parametrize("version", ["../v", "a/b", "", ".hidden", "a\nb", "x" * 200, "a\0b"])
def test_names_that_lead_elsewhere_are_refused(root, night, version):
    with pytest.raises(ArtefactError, match="not the name of a version"):
        night(root, version, 1)
    assert not storage.exists(root)
