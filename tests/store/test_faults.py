"""Whatever fails while publishing, a reader sees the old version or the new one, and running again converges.

On memory, local files and S3 (a server that the tests start), for every operation of a publish.
"""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from itertools import count

import fsspec
import pytest
import stores
from nights import NEW, OLD, USERS, content, opened, rejected_by_all
from stores import Faults, failing

from conrec import storage
from conrec.errors import ArtefactError, AuditError, ConrecError, PublishError
from conrec.serving import versions
from conrec.store.lock import is_abandoned
from conrec.store.publish import rollback, verify

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def s3():
    with stores.s3_server():
        yield


@pytest.fixture(params=["memory", "local", "s3"])
def root(request, tmp_path):
    """An empty place behind a protocol that can fail."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        return f"faultys3://{stores.BUCKET}/{tmp_path.name}"
    if request.param == "local":
        return f"faultyfile://{tmp_path}/blocklists"
    stores.FaultyMemory.store.clear()
    stores.FaultyMemory.pseudo_dirs[:] = [""]
    return "faultymemory:///blocklists"


@pytest.mark.parametrize(("after", "dies"), [(False, False), (True, True)], ids=["fails before", "dies after"])
def test_a_failure_at_every_operation(root, night, after, dies):
    night(root, "v1", 1, buckets=1)
    pointer = storage.read_bytes(versions.pointer_url(root))
    kept = replaced = 0
    on_s3 = "s3" in root
    for position in count():
        with failing(root, Faults(position, after, dies)) as faults, contextlib.suppress(AuditError, PublishError):
            night(root, "v2", 2, buckets=1)
        if not faults.struck:
            break
        seen = content(root)
        assert seen in (OLD, NEW), position
        kept, replaced = kept + (seen == OLD), replaced + (seen == NEW)

        night(root, "v2", 2, buckets=1)
        assert content(root) == NEW, position
        if not on_s3:
            verify(root)
        for name in storage.list_files(root):  # only the release itself may have failed, and then it holds nobody up
            assert not name.endswith(".lock") or is_abandoned(storage.read_bytes(storage.join(root, name)))
        storage.write_bytes(versions.pointer_url(root), pointer)
        stores.empty(versions.version_url(root, "v2"))
    assert content(root) == NEW
    verify(root)
    assert kept > 5
    assert replaced > 0 or not after


def test_a_rollback_that_fails_anywhere_leaves_one_or_the_other(root, night):
    night(root, "v1", 1, buckets=1)
    night(root, "v2", 2, buckets=1)
    pointer = storage.read_bytes(versions.pointer_url(root))
    seen = set()
    for position, after in ((position, after) for position in count() for after in (False, True)):
        with failing(root, Faults(position, after, dies=True)) as faults, contextlib.suppress(ConrecError):
            rollback(root, "v1")
        if not faults.struck:
            break
        seen.add(content(root)[0])
        rollback(root, "v1")
        assert content(root) == OLD
        storage.write_bytes(versions.pointer_url(root), pointer)
    assert seen == {"v1", "v2"}


@pytest.mark.parametrize(
    ("faults", "says"),
    [(stores.full_disk, "No space left"), (stores.read_only, "Read-only")],
    ids=["full", "read-only"],
)
def test_a_store_that_takes_no_more_is_told_and_readers_go_on(root, night, faults, says):
    night(root, "v1", 1)
    reader = opened(root)
    with failing(root, faults()), pytest.raises(PublishError, match=f"{says}.*readers keep a whole version"):
        night(root, "v2", 2)
    with failing(root, faults()), pytest.raises(PublishError, match=says):
        night(root, "v3", 2)
    assert not reader.refresh()
    assert content(root) == OLD
    night(root, "v2", 2)
    assert content(root) == NEW


def test_a_disk_that_fills_up_at_any_write_of_a_rollback(root, night):
    night(root, "v1", 1)
    night(root, "v2", 2)
    with failing(root, stores.read_only()), pytest.raises(PublishError, match="Read-only"):
        rollback(root, "v1")
    assert content(root) == NEW


def flipped(data, position):
    return data[:position] + bytes([data[position] ^ (1 << position % 8)]) + data[position + 1 :]


def test_a_flipped_byte_anywhere_in_the_pointer_is_an_error_or_changes_nothing(root, night):
    night(root, "v1", 1, buckets=1)
    night(root, "v2", 2, buckets=1)
    url = versions.pointer_url(root)
    data = storage.read_bytes(url)
    errors = 0
    reader = opened(root)
    positions = range(0, len(data), 7 if "s3" in root else 1)
    for position in positions:
        storage.write_bytes(url, flipped(data, position))
        try:
            assert content(root) == NEW, position
        except ArtefactError:
            errors += 1
            with pytest.raises(ArtefactError):
                reader.refresh()
            assert reader.filter("user0", ["item01", "item05"]) == ["item05"]
    assert errors > len(positions) / 2
    night(root, "v3", 2)  # mends it
    assert content(root)[0] == "v3"


@pytest.mark.parametrize("file", ["manifest.json", "data/bucket-00000.parquet"])
def test_a_flipped_byte_and_a_cut_anywhere_in_a_version_are_errors(root, night, file):
    night(root, "v1", 1, buckets=1)
    reader = opened(root)
    night(root, "v2", 2, buckets=1)
    url = storage.join(versions.version_url(root, "v2"), file)
    data = storage.read_bytes(url)
    samples = 5 if "s3" in root else 40
    positions = random.Random(0).sample(range(len(data)), min(samples, len(data)))
    for position in positions:
        for damaged in (flipped(data, position), data[:position]):
            storage.write_bytes(url, damaged)
            with pytest.raises(ArtefactError):
                opened(root)
            with pytest.raises(ArtefactError):
                verify(root)
    with pytest.raises(ArtefactError):
        reader.refresh()
    assert reader.version == "v1"
    assert reader.filter("user0", ["item00", "item01"]) == ["item01"]
    with pytest.raises(ArtefactError):
        night(root, "v2", 2, buckets=1)
    rollback(root, "v1")
    assert content(root) == OLD


def test_a_manifest_of_a_later_release_is_refused_by_name(root, night):
    night(root, "v1", 1)
    night(root, "v2", 2)
    url = storage.join(versions.version_url(root, "v2"), "manifest.json")
    manifest = json.loads(storage.read_bytes(url))
    for schema_version, remedy in ((4, "install a newer conrec"), (1, "publish again")):
        storage.write_json(url, {**manifest, "schema_version": schema_version})
        with pytest.raises(ArtefactError, match=rf"manifest.json: schema version {schema_version}, .* 3; {remedy}"):
            rollback(root, "v2")
    assert versions.read_pointer(root)["version"] == "v2"
    rollback(root, "v1")
    assert content(root) == OLD


NAMES = ["../v1", "../../secret", "/etc/passwd", "v1/../../x", "v1\n", "\nv1", "v\0", "v1 ", "", ".", "..", "x" * 10**7]


def test_a_pointer_cannot_lead_outside_the_root(tmp_path, night):
    root = str(tmp_path / "blocklists")
    night(root, "v1", 1)
    manifest = tmp_path / "blocklists" / "versions" / "v1" / "manifest.json"
    for outside in (tmp_path, tmp_path / "blocklists", tmp_path / "blocklists" / "versions"):
        (outside / "manifest.json").write_bytes(manifest.read_bytes())
    pointer = versions.read_pointer(root)
    for name in NAMES:
        for key, value in (("version", name), ("previous", name), ("left", {name: pointer["swapped_at"]})):
            storage.write_json(versions.pointer_url(root), {**pointer, key: value})
            with pytest.raises(ArtefactError, match=r"CURRENT.json: damaged: ") as error:
                opened(root)
            assert len(str(error.value)) < 500
    night(root, "v2", 2)
    assert content(root) == NEW


PATHS = [
    "../v1/data/bucket-00000.parquet",
    "data/../../../secret.parquet",
    "/etc/passwd",
    "data//etc/passwd.parquet",
    "data/a\n.parquet",
    "data/a\0.parquet",
    "data/.hidden.parquet",
    "s3://elsewhere/x.parquet",
    "data/" + "x" * 10**7,
]


def test_a_manifest_cannot_lead_outside_its_version(tmp_path, night):
    root = str(tmp_path)
    manifest = night(root, "v2", 2)
    night(root, "v1", 1)
    url = storage.join(versions.version_url(root, "v2"), "manifest.json")
    for path in PATHS:
        storage.write_json(url, {**manifest, "files": [{**manifest["files"][0], "path": path}, *manifest["files"][1:]]})
        for attempt in (lambda: rollback(root, "v2"), lambda: verify(root, "v2"), lambda: night(root, "v2", 2)):
            with pytest.raises(ArtefactError, match="fields are missing") as error:
                attempt()
            assert len(str(error.value)) < 500
    assert content(root) == OLD


BROKEN = {
    "nested too deep": b"[" * 100_000,
    "not UTF-8": b"\xff\xfe{}",
    "a list": b"[]",
    "null": b"null",
    "empty": b"",
    "a number of 5000 digits": b'{"version": ' + b"9" * 5000 + b"}",
    "another type": b'{"version": 7, "manifest_sha256": null}',
    "a digest that is a path": b'{"version": "v1", "manifest_sha256": "../x", "previous": null, "left": {}}',
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_pointer_or_manifest_is_named(tmp_path, night, broken):
    root = str(tmp_path)
    night(root, "v1", 1)
    night(root, "v2", 2)
    storage.write_bytes(versions.pointer_url(root), broken)
    with pytest.raises(ArtefactError, match=r"CURRENT\.json: damaged"):
        opened(root)
    rollback(root, "v1")
    storage.write_bytes(storage.join(versions.version_url(root, "v2"), "manifest.json"), broken)
    with pytest.raises(ArtefactError, match=r"manifest\.json: damaged"):
        rollback(root, "v2")
    assert content(root) == OLD


@pytest.mark.parametrize(
    "change",
    [
        {"buckets": True},
        {"buckets": 0},
        {"buckets": -1},
        {"schema_version": True},
        {"published_at": "yesterday"},
        {"published_at": "2026-01-01T00:00:00"},
        {"previous": "../x"},
        {"about": {"watermark_us": 1e3}},
        {"about": {"watermark_us": 10**30}},
        {"about": {"watermark_us": -1}},
        {"files": {}},
        {"figures": None},
    ],
    ids=str,
)
def test_a_manifest_with_a_field_of_another_kind_is_refused(tmp_path, night, change):
    root = str(tmp_path)
    manifest = night(root, "v1", 1)
    storage.write_json(storage.join(versions.version_url(root, "v1"), "manifest.json"), {**manifest, **change})
    with pytest.raises(ArtefactError, match=r"manifest\.json: damaged"):
        versions.read_manifest(root, "v1")


def test_a_manifest_that_names_a_file_twice_is_refused(tmp_path, night):
    root = str(tmp_path)
    manifest = night(root, "v1", 1)
    manifest["files"].append(manifest["files"][0])
    storage.write_json(storage.join(versions.version_url(root, "v1"), "manifest.json"), manifest)
    with pytest.raises(ArtefactError, match="damaged"):
        versions.read_manifest(root, "v1")


def test_readers_see_whole_versions_while_publishers_race_and_one_rolls_back(root, night):
    """Version vN-... blocks the first N items for every user; any other answer is torn."""
    night(root, "v1", 1)
    stop, reads, problems = threading.Event(), [0, 0, 0], []
    wanted = 1_500 if "s3" in root else 10_000
    items = rejected_by_all(4)["user0"]

    def read(slot):
        reader = opened(root)
        while not stop.is_set():
            try:
                reader.refresh()
                version = reader.version
                for _ in range(20):
                    answers = reader.filter_batch(USERS, [items] * len(USERS))
                    expected = items[int(version[1]) :]
                    if any(answer != expected for answer in answers):
                        problems.append((version, answers))
                    reads[slot] += 1
                # A reader that opens anew must find a version too.
                if content(root)[1]["user5"] == []:
                    problems.append("a user is missing")
                reads[slot] += 1
            except Exception as error:
                problems.append(error)
                return

    def publish(name):
        for number in count():
            if stop.is_set():
                return
            rejected = 1 + number % 3
            with contextlib.suppress(PublishError):
                night(root, f"v{rejected}-{name}-{number}", rejected)
            if number % 3 == 2:
                with contextlib.suppress(PublishError):
                    rollback(root, "v1")

    threads = [threading.Thread(target=read, args=(slot,)) for slot in range(len(reads))]
    threads += [threading.Thread(target=publish, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 300  # as slow as the machine may be
    while sum(reads) < wanted and not problems and time.monotonic() < deadline:
        time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems, problems[:3]
    assert sum(reads) >= wanted
    for name in versions.version_names(root):
        verify(root, name)
    assert len(versions.version_names(root)) > 5


def test_the_faulty_stores_are_what_they_stand_for():
    """Publishing looks at the kind of a store: the doubles must be of the same kind."""
    for protocol, kind in (("faultymemory", "memory"), ("faultyfile", "file"), ("faultys3", "s3")):
        assert issubclass(fsspec.get_filesystem_class(protocol), fsspec.get_filesystem_class(kind))
