"""A version is written once, audited and pointed at; of two publishers one wins and nothing is mixed."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime, timedelta

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from nights import ABOUT, DAY, NEW, NOW, OLD, content

from conrec import __version__, storage
from conrec.errors import ArtefactError, AuditError, PublishError
from conrec.serving import versions
from conrec.serving.reader import BlocklistReader
from conrec.store import pointers
from conrec.store.lock import Lock
from conrec.store.publish import rollback, verify


@pytest.fixture(params=["memory", "local"])
def root(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "blocklists")
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    return "memory://blocklists"


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
    with pytest.raises(ArtefactError, match=r"another night \(different: failures\).*rollback v1 .*versions/v1 and"):
        night(root, "v1", 2, {**ABOUT, "failures": ["x"]})
    assert content(root) == OLD


def test_a_version_is_adopted_whatever_is_counted_by_now(root, night):
    """Killed before its pointer moved; another night of the root met more items before it ran again."""
    made = night(root, "v1", 1, {**ABOUT, "items": {"removed": 1}, "everybody": {"items": []}})
    storage.remove(versions.pointer_url(root))
    assert night(root, "v1", 1, {**ABOUT, "items": {"removed": 2}}) == made
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
        pointers.create_manifest(root, "v1", {**manifest, "published_at": "2020-01-01T00:00:00+00:00"})
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


@pytest.mark.parametrize(
    "version", ["../v", "a/b", "", ".hidden", "a\nb", "x" * 10_000_000, "a\0b", "/etc/passwd", "v\n"]
)
def test_names_that_lead_elsewhere_are_told_in_a_line(root, night, version):
    night(root, "v1", 1)
    for attempt in (lambda: rollback(root, version), lambda: verify(root, version)):
        with pytest.raises(ArtefactError, match="not the name of a version") as error:
            attempt()
        assert len(str(error.value)) < 300
    assert content(root) == OLD


def test_the_manifest_says_what_came_before_and_which_release_wrote_it(root, night):
    assert night(root, "v1", 1)["previous"] is None
    manifest = night(root, "v2", 2)
    assert (manifest["previous"], manifest["code_version"], manifest["schema_version"]) == ("v1", __version__, 3)


def test_the_watermark_never_goes_back_but_by_rollback(root, night):
    night(root, "v2", 2)
    earlier = {**ABOUT, "watermark_us": NOW - DAY}
    with pytest.raises(PublishError, match=r"v1 is of 2023-11-13.*CURRENT.json names v2 of 2023-11-14.*rollback"):
        night(root, "v1", 1, earlier)
    assert content(root) == NEW
    assert not storage.exists(versions.version_url(root, "v1"))  # told before anything is written

    night(root, "v3", 1)  # the same watermark again is fine
    assert content(root)[0] == "v3"
    night(root, "v1", 1, earlier, pointer="shadow")  # the other pointer has a course of its own
    assert content(root, "shadow") == OLD
    rollback(root, "v1")
    assert content(root) == OLD
    night(root, "v2", 2)
    assert content(root) == NEW


def test_the_watermark_never_goes_back_when_the_pointer_is_damaged(root, night):
    night(root, "v2", 2)
    storage.write_bytes(versions.pointer_url(root), b"{}")
    with pytest.raises(PublishError, match="rollback"):
        night(root, "v1", 1, {**ABOUT, "watermark_us": NOW - DAY})
    night(root, "v3", 1, {**ABOUT, "watermark_us": NOW + 1})
    assert content(root)[0] == "v3"


OF_2060 = {**ABOUT, "watermark_us": 2_850_000_000_000_000}


@pytest.fixture
def of_2060(root, publish_unaudited):
    """Publishes a night with an event of 2060, as releases without the rule `clock` did."""
    return lambda: publish_unaudited(root, [], version="of-2060", about=OF_2060)


def test_a_night_of_the_future_is_not_published(root, night):
    night(root, "v1", 1)
    with pytest.raises(AuditError, match="clock: version: the last event is of 2060"):
        night(root, "of-2060", 2, OF_2060)
    assert content(root) == OLD


@pytest.mark.parametrize("damaged", [False, True])
def test_the_way_back_from_a_night_of_the_future_is_rollback(root, night, of_2060, damaged):
    night(root, "v1", 1)
    of_2060()
    if damaged:
        storage.write_bytes(versions.pointer_url(root), b"{}")
    with pytest.raises(PublishError, match=r"of-2060 of 2060.*conrec rollback.*ahead of the clock"):
        night(root, "v2", 2)
    rollback(root, "v1")
    assert content(root) == OLD
    night(root, "v2", 2)
    assert content(root) == NEW


def test_the_way_back_where_no_night_came_before_the_one_of_the_future(root, night, of_2060):
    of_2060()
    with pytest.raises(PublishError, match=r"delete CURRENT\.json where there is none older"):
        night(root, "v1", 1)
    storage.remove(versions.pointer_url(root))
    night(root, "v1", 1)
    assert content(root) == OLD


def test_the_shadow_is_a_pointer_of_its_own(root, night):
    night(root, "v1", 1)
    night(root, "v2", 2, pointer="shadow")
    assert content(root) == OLD
    assert content(root, "shadow") == NEW
    night(root, "v2", 2)
    rollback(root, "v1", "shadow")
    assert (content(root), content(root, "shadow")) == (NEW, OLD)


def test_who_finds_the_pointer_moved_is_told_the_winner(root, night):
    night(root, "v1", 1)
    before = pointers.observe(root)
    night(root, "v2", 2)
    digest = versions.read_manifest(root, "v1")[1]
    with pytest.raises(PublishError, match=r"it names v2 since 20.*run again"):
        pointers.swap_pointer(before, "v1", digest)
    assert content(root) == NEW


@pytest.mark.long
def test_of_publishers_at_once_one_wins(root, night):
    night(root, "v0", 0)
    for attempt in range(8):
        names = [f"a{attempt}", f"b{attempt}", f"c{attempt}"]
        barrier, ends = threading.Barrier(len(names)), {}

        def run(name, rejected, barrier=barrier, ends=ends):
            barrier.wait()
            try:
                night(root, name, rejected)
                ends[name] = "won"
            except PublishError as error:
                ends[name] = str(error)

        threads = [threading.Thread(target=run, args=(name, number)) for number, name in enumerate(names)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # They may also have come one after the other: then all of them won, the last one last.
        named = versions.read_pointer(root)["version"]
        assert ends[named] == "won"
        assert all(end == "won" or "another publisher moved the pointer" in end for end in ends.values()), ends
        assert {len(items) for items in content(root)[1].values()} == {names.index(named)}
        for name in names:
            verify(root, name)
    assert not storage.list_files(storage.join(root, "locks"))


def test_of_publishers_of_one_version_at_once_one_writes_it(root, night):
    night(root, "v1", 1)
    for attempt in range(8):
        version = f"w{attempt}"
        barrier, ends = threading.Barrier(3), []

        def run(version=version, barrier=barrier, ends=ends, buckets=2):
            barrier.wait()
            try:
                ends.append(night(root, version, 2, buckets=buckets)["published_at"])
            except PublishError as error:
                ends.append(error)

        threads = [threading.Thread(target=run, kwargs={"buckets": buckets}) for buckets in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        manifest = versions.read_manifest(root, version)[0]
        assert manifest["published_at"] in ends
        assert all(end == manifest["published_at"] or isinstance(end, PublishError) for end in ends)
        verify(root, version)
        assert content(root) == (version, NEW[1])


def test_a_version_that_another_publisher_writes_is_left_alone(root, night):
    lease = timedelta(minutes=1)
    with (
        Lock(pointers.lock_url(root, "v1"), lease, "publishing v1"),
        pytest.raises(PublishError, match=r"held by publishing v1 \(host .*, process \d+, since 20"),
    ):
        night(root, "v1", 1)
    night(root, "v1", 1)
    assert content(root) == OLD


def test_a_publisher_that_lost_its_lock_completes_nothing(root, night, blocks_of):
    """It slept past its lease, and another one began to write the version."""
    night(root, "v1", 1)
    lock = storage.join(root, "locks", "v2.lock")

    def taken_over(manifest):
        storage.write_bytes(lock, storage.read_bytes(lock).replace(b'"token": "', b'"token": "other'))
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("conrec.store.publish.audit", lambda root, manifest, *_: taken_over(manifest))
        with pytest.raises(PublishError, match="took over from publishing v2"):
            night(root, "v2", 2)
    assert versions.read_manifest(root, "v2") is None
    assert content(root) == OLD


def test_verify_reads_every_byte_and_names_all_that_is_wrong(root, night):
    manifest = night(root, "v1", 1)
    url = versions.version_url(root, "v1")
    sizes = sum(storage.size(storage.join(url, name)) for name in storage.list_files(url) if name != versions.MANIFEST)
    verified = verify(root)
    assert (verified.version, verified.files, verified.bytes, verified.rows) == ("v1", 5, sizes, 12)

    first, second = (storage.join(url, entry["path"]) for entry in manifest["files"][:2])
    data = storage.read_bytes(first)
    storage.write_bytes(first, data[:10] + bytes([data[10] ^ 1]) + data[11:])
    storage.remove(second)
    storage.write_bytes(storage.join(url, "data", "more.parquet"), data)
    storage.remove(versions.compiled_url(root, "v1"))
    with pytest.raises(ArtefactError) as error:
        verify(root, "v1")
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    for place, what, line in zip(
        (first, second, "compiled.zst", "more.parquet"),
        ("SHA-256", "missing", "missing", "name it"),
        lines,
        strict=True,
    ):
        assert place.split("/")[-1] in line and what in line


def test_verify_holds_the_manifest_against_the_pointer(root, night):
    night(root, "v1", 1)
    url = storage.join(versions.version_url(root, "v1"), "manifest.json")
    storage.write_bytes(url, storage.read_bytes(url) + b" ")
    with pytest.raises(ArtefactError, match="the pointer says"):
        verify(root)


def test_the_pointer_remembers_what_it_left(root, night):
    started = datetime.now(UTC)
    for version in ("v1", "v2", "v3"):
        night(root, version, 1)
    rollback(root, "v1")
    left = versions.read_pointer(root)["left"]
    assert list(left) == ["v2", "v3"]
    assert all(started < datetime.fromisoformat(time) < datetime.now(UTC) for time in left.values())
