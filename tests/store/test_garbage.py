"""Garbage goes; what serving reads, may still be opening, or may go back to, stays."""

from __future__ import annotations

import contextlib
import json
import os
import time
from datetime import UTC, datetime, timedelta
from itertools import count

import pytest
import stores
from fsspec.implementations.memory import MemoryFileSystem
from nights import ABOUT, NOW, content
from stores import Faults, failing

from conrec import storage
from conrec.errors import ArtefactError, ConfigError, ConrecError, PublishError
from conrec.serving import versions
from conrec.store import pointers
from conrec.store.garbage import collect_garbage
from conrec.store.lock import Lock
from conrec.store.publish import rollback, verify

AT_ONCE = {"grace": timedelta(0), "min_orphan_age": timedelta(0)}


@pytest.fixture(params=["memory", "local"])
def root(request, tmp_path):
    if request.param == "local":
        return f"faultyfile://{tmp_path}/blocklists"
    stores.FaultyMemory.store.clear()
    stores.FaultyMemory.pseudo_dirs[:] = [""]
    MemoryFileSystem.store.clear()
    return "faultymemory:///blocklists"


def collect_or_fail(root):
    with contextlib.suppress(OSError, ConrecError):
        collect_garbage(root, 2, **AT_ONCE)


@pytest.fixture
def five(root, night):
    """Versions v1 to v5, the last one current."""
    for number in range(1, 6):
        night(root, f"v{number}", 1 + number % 2, {**ABOUT, "watermark_us": NOW + number}, buckets=1)
    return root


def test_the_newest_stay_and_the_others_go(five):
    before = set(storage.list_files(five))
    collected = collect_garbage(five, 3, dry_run=True, **AT_ONCE)
    assert set(storage.list_files(five)) == before
    assert collected == collect_garbage(five, 3, **AT_ONCE)
    assert sorted(collected.versions) == ["v1", "v2"]
    assert versions.version_names(five) == ["v3", "v4", "v5"]
    gone = before - set(storage.list_files(five))
    assert gone == {name for name in before if name.startswith(("versions/v1/", "versions/v2/"))}
    assert collected.bytes > 0
    for name in ("v3", "v4", "v5"):
        verify(five, name)
    assert collect_garbage(five, 3, **AT_ONCE).versions == []
    assert content(five)[0] == "v5"


def test_nights_go_with_their_versions(root, night, tmp_path):
    for version in ("20260101T000000Z-aaa", "20260102T000000Z-bbb", "20260103T000000Z-ccc"):
        night(root, version, 1, {**ABOUT, "watermark_us": NOW + int(version[7])}, buckets=1)
    nights = str(tmp_path / "nightly")
    for name in ("aaa/generated/0.parquet", "bbb/prompts.json", "ccc/prompts.json", "never/progress/1"):
        storage.write_bytes(storage.join(nights, name), b"12345")
    young = collect_garbage(root, 2, grace=timedelta(0), dry_run=True, nights=nights)
    assert young.nights == []  # younger than a day: some night may be about to be published from it
    only_said = collect_garbage(root, 2, **AT_ONCE, dry_run=True, nights=nights)
    assert len(storage.list_files(nights)) == 4
    done = collect_garbage(root, 2, **AT_ONCE, nights=nights)
    assert only_said.nights == done.nights == ["aaa", "never"]
    assert done.versions == ["20260101T000000Z-aaa"]
    assert {name.split("/")[0] for name in storage.list_files(nights)} == {"bbb", "ccc"}


def test_the_newest_finished_night_stays_though_no_version_is_of_it(five, tmp_path):
    """Its audit let it publish nothing, and the night after keeps its rows."""
    nights = str(tmp_path / "nightly")
    for second, name in enumerate(("older/artefact.json", "newest/artefact.json", "unfinished/prompts.json")):
        storage.write_bytes(storage.join(nights, name), b"{}")
        os.utime(tmp_path / "nightly" / name, (second, second))
    assert collect_garbage(five, 5, **AT_ONCE, nights=nights).nights == ["older", "unfinished"]
    assert storage.list_files(nights) == ["newest/artefact.json"]


def test_a_night_stays_while_one_of_its_versions_does(root, night, tmp_path):
    """A deadline ended it, and it was published under a name of its own; then it went on."""
    for second, version in enumerate(("20260101T000000Z-1234-aaa", "20260101T000000Z-aaa", "20260103T000000Z-ccc")):
        night(root, version, 1, {**ABOUT, "watermark_us": NOW + second}, buckets=1)
    nights = str(tmp_path / "nightly")
    storage.write_bytes(storage.join(nights, "aaa/generated/0.parquet"), b"12345")
    collected = collect_garbage(root, 2, **AT_ONCE, nights=nights)
    assert (collected.versions, collected.nights) == (["20260101T000000Z-1234-aaa"], [])
    assert storage.list_files(nights) == ["aaa/generated/0.parquet"]


def test_a_night_that_is_half_removed_does_not_look_finished(five, tmp_path, monkeypatch):
    nights, remove = str(tmp_path / "nightly"), storage.remove
    for second, name in enumerate(("older/artefact.json", "newest/artefact.json")):
        storage.write_bytes(storage.join(nights, name), b"{}")
        os.utime(tmp_path / "nightly" / name, (second, second))

    def killed(url):
        if url.endswith("/older"):
            raise OSError("killed")
        remove(url)

    monkeypatch.setattr(storage, "remove", killed)
    with pytest.raises(OSError, match="killed"):
        collect_garbage(five, 5, **AT_ONCE, nights=nights)
    assert storage.list_files(nights) == ["newest/artefact.json"]


def test_what_a_pointer_names_and_the_one_before_stay(five, night):
    rollback(five, "v3", "shadow")
    rollback(five, "v2")
    collected = collect_garbage(five, 1, **AT_ONCE)
    # v5: before the rollback of current, and the newest; v1: before v2 when that was written; v2 for v3.
    assert sorted(collected.versions) == ["v4"]
    assert content(five)[0] == "v2"
    assert content(five, "shadow")[0] == "v3"
    rollback(five, "v5")


def test_the_version_before_a_rollback_stays(five):
    rollback(five, "v3")
    rollback(five, "v1")
    assert sorted(collect_garbage(five, 1, **AT_ONCE).versions) == ["v2", "v4"]  # v3 is where it was before


def test_a_version_stays_while_readers_may_still_open_it(five):
    storage.write_json(versions.pointer_url(five), {**versions.read_pointer(five), "left": {}})
    assert collect_garbage(five, 1).versions == []  # all are younger than the grace period
    hour = timedelta(hours=1)
    for number in range(1, 6):  # published long ago
        url = storage.join(versions.version_url(five, f"v{number}"), "manifest.json")
        manifest = json.loads(storage.read_bytes(url))
        published_at = datetime.now(UTC) - timedelta(days=6 - number)
        storage.write_json(url, {**manifest, "published_at": published_at.isoformat()})
    pointer = versions.read_pointer(five)
    digest = versions.read_manifest(five, "v5")[1]
    left = {name: (datetime.now(UTC) - hours * hour).isoformat() for name, hours in (("v1", 2), ("v2", 0.5), ("v3", 9))}
    storage.write_json(versions.pointer_url(five), {**pointer, "manifest_sha256": digest, "left": left})
    assert sorted(collect_garbage(five, 1).versions) == ["v1", "v3"]  # v2 was current half an hour ago, v4 is previous
    assert versions.version_names(five) == ["v2", "v4", "v5"]


def test_versions_that_were_never_completed_go_by_their_age(five):
    for name in ("w1", "w2"):
        storage.write_bytes(storage.join(five, "versions", name, "data", "bucket-00000.parquet"), b"x")
    assert collect_garbage(five, 9).orphans == []
    with Lock(pointers.lock_url(five, "w1"), timedelta(minutes=1), "publishing w1"):
        assert collect_garbage(five, 9, dry_run=True, **AT_ONCE).orphans == ["w2"]
        assert collect_garbage(five, 9, **AT_ONCE).orphans == ["w2"]
    assert collect_garbage(five, 9, **AT_ONCE).orphans == ["w1"]
    assert versions.version_names(five) == ["v1", "v2", "v3", "v4", "v5"]


def test_partial_files_and_abandoned_locks_go(tmp_path, night):
    root = str(tmp_path / "blocklists")
    night(root, "v1", 1)
    partial = tmp_path / "blocklists" / "versions" / "v1" / "data" / ".bucket-00000.parquet.x.partial"
    partial.write_bytes(b"half")
    fresh = tmp_path / "blocklists" / ".CURRENT.json.y.partial"
    fresh.write_bytes(b"half")
    os.utime(partial, (time.time() - 90_000,) * 2)
    lock = {"token": "t", "holder": "h", "host": "h", "machine": "m", "pid": 1, "taken_at": 1.0, "lease_seconds": 60.0}
    for name in ("CURRENT.json.lock", "locks/v9.lock"):
        storage.write_json(storage.join(root, name), lock)
    storage.write_json(storage.join(root, "locks", "v8.lock"), {**lock, "taken_at": time.time()})
    names = ["CURRENT.json.lock", "locks/v9.lock", f"versions/v1/data/{partial.name}"]
    assert sorted(collect_garbage(root, 1, dry_run=True).files) == names
    assert partial.exists()
    assert sorted(collect_garbage(root, 1).files) == names
    assert not partial.exists()
    assert fresh.exists()
    assert storage.list_files(storage.join(root, "locks")) == ["v8.lock"]
    verify(root)


def test_nothing_goes_while_it_is_unknown_what_readers_need(five):
    url = versions.pointer_url(five)
    pointer = storage.read_bytes(url)
    before = set(storage.list_files(five))
    for damage in (b"{}", pointer.replace(b'"v5"', b'"v6"'), pointer.replace(b'"manifest_sha256": "', b'"x": "')):
        storage.write_bytes(url, damage)
        with pytest.raises(ArtefactError):
            collect_garbage(five, 1, **AT_ONCE)
        assert set(storage.list_files(five)) == before
    for keep in (0, -1):
        with pytest.raises(ConfigError, match="at least 1"):
            collect_garbage(five, keep)


def test_a_version_of_another_release_stays_and_is_named(five):
    url = storage.join(versions.version_url(five, "v1"), "manifest.json")
    storage.write_json(url, {**json.loads(storage.read_bytes(url)), "schema_version": 4})
    collected = collect_garbage(five, 1, **AT_ONCE)
    assert sorted(collected.versions) == ["v2", "v3"]
    assert len(collected.unreadable) == 1
    assert "schema version 4" in collected.unreadable[0]
    assert any(line.startswith("! ") for line in collected.lines())


@pytest.mark.long
def test_the_collection_that_fails_anywhere_leaves_no_version_that_looks_whole(root, night):
    for position in count():
        stores.empty(root)
        for number in range(1, 5):
            night(root, f"v{number}", 1, {**ABOUT, "watermark_us": NOW + number}, buckets=1)
        with failing(root, Faults(position, after=bool(position % 2), dies=True)) as faults:
            collect_or_fail(root)
        for name in versions.version_names(root):
            if versions.read_manifest(root, name) is not None:
                verify(root, name)
        collect_garbage(root, 2, **AT_ONCE)
        assert versions.version_names(root) == ["v3", "v4"], position
        assert content(root)[0] == "v4"
        if not faults.struck:
            break
    assert position > 10


def test_a_version_that_a_rollback_names_meanwhile_comes_back(five, monkeypatch):
    remove = storage.remove

    def raced(url):
        remove(url)
        if url.endswith("v1/manifest.json"):  # the rollback verified it just before
            pointers.swap_pointer(pointers.observe(five), "v1", digest)

    digest = versions.read_manifest(five, "v1")[1]
    monkeypatch.setattr(storage, "remove", raced)
    assert sorted(collect_garbage(five, 2, **AT_ONCE).versions) == ["v2", "v3"]
    monkeypatch.undo()
    assert content(five)[0] == "v1"
    verify(five, "v1")


def test_a_rollback_to_a_version_that_is_collected_meanwhile_is_taken_back(five, monkeypatch):
    swap = pointers.swap_pointer

    def raced(before, version, digest):
        storage.remove(storage.join(versions.version_url(five, version), "manifest.json"))
        swap(before, version, digest)

    monkeypatch.setattr(pointers, "swap_pointer", raced)
    with pytest.raises(PublishError, match="collected as garbage"):
        rollback(five, "v1")
    assert content(five)[0] == "v5"
