"""A person is taken out of every version, nothing of anybody else changes, and readers see whole versions only."""

from __future__ import annotations

import contextlib
from datetime import timedelta
from itertools import count

import pyarrow.parquet as parquet
import pytest
import stores
from nights import ABOUT, NOW, USERS, content, opened
from stores import Faults, failing

from conrec import storage
from conrec.errors import ArtefactError, ConrecError, PublishError
from conrec.serving import rows, versions
from conrec.serving.mirror import mirror
from conrec.store import pointers
from conrec.store.forget import file_holds, forget, mentions
from conrec.store.garbage import collect_garbage
from conrec.store.lock import Lock
from conrec.store.publish import rollback, verify

GONE = "user1"
OTHERS = [user for user in USERS if user != GONE]
FIRST, SECOND = "20260101T000000Z-aaa", "20260102T000000Z-bbb"
AGAIN = ["20260101T000000Z.1-aaa", "20260102T000000Z.1-bbb"]


@pytest.fixture(params=["memory", "local"])
def root(request, tmp_path):
    if request.param == "local":
        return f"faultyfile://{tmp_path}/blocklists"
    stores.FaultyMemory.store.clear()
    return "faultymemory:///blocklists"


@pytest.fixture
def two(root, night):
    """Two versions, the second one current."""
    night(root, FIRST, 1)
    night(root, SECOND, 2, {**ABOUT, "watermark_us": NOW + 1})
    return root


def holding(root):
    """Files that hold the person, found by reading all of them, whole."""
    names = [name for name in storage.list_files(root, hidden=True) if name.endswith(".parquet")]
    return [name for name in names if GONE in storage.read_table(storage.join(root, name))["user_id"].to_pylist()]


def test_nobody_else_notices(two):
    before, reader = content(two)[1], opened(two)
    published_at = versions.read_manifest(two, SECOND)[0]["published_at"]
    assert forget(two, [GONE]) == dict(zip([FIRST, SECOND], AGAIN, strict=True))
    assert holding(two) == []
    assert versions.version_names(two) == AGAIN
    assert content(two) == (AGAIN[1], {user: [] if user == GONE else before[user] for user in USERS})
    pointer, (manifest, _) = versions.read_pointer(two), versions.read_manifest(two, AGAIN[1])
    assert (pointer["previous"], list(pointer["left"])) == (AGAIN[0], [AGAIN[0]])
    assert manifest["published_at"] == published_at  # its age is that of the list
    assert manifest["figures"]["users"] == len(OTHERS)
    assert reader.blocklist(GONE)  # until it refreshes
    assert reader.refresh()
    assert reader.blocklist(GONE) == []
    for name in AGAIN:
        verify(two, name)
    rollback(two, AGAIN[0])
    assert content(two)[1] == {user: [] if user == GONE else ["item00"] for user in USERS}
    at_once = {"grace": timedelta(0), "min_orphan_age": timedelta(0)}
    rollback(two, AGAIN[1])
    assert collect_garbage(two, 1, **at_once).versions == []  # the version before stays, by its other name


def test_one_more_person_and_nobody(two):
    assert forget(two, ["nobody"]) == {}
    assert versions.version_names(two) == [FIRST, SECOND]
    forget(two, [GONE])
    twice = forget(two, ["user2", "user3"])
    assert twice == {AGAIN[0]: "20260101T000000Z.2-aaa", AGAIN[1]: "20260102T000000Z.2-bbb"}
    assert sorted(user for user, items in content(two)[1].items() if items) == ["user0", "user4", "user5"]


@pytest.mark.long
def test_whatever_fails_readers_have_a_whole_version_and_the_next_run_converges(root, night):
    # All positions pass; every so many are enough to notice a change, and take seconds.
    for number, position in enumerate(count(0, 17 if root.startswith("faultyfile") else 5)):
        stores.empty(root)
        night(root, FIRST, 2, buckets=2)
        old = content(root)
        faults = Faults(position, after=bool(number % 2), dies=True)
        with failing(root, faults), contextlib.suppress(OSError, ConrecError):
            forget(root, [GONE])
        found = content(root)
        assert found in (old, (AGAIN[0], {**old[1], GONE: []}))
        verify(root)
        forget(root, [GONE])
        assert holding(root) == []
        assert content(root)[1] == {**old[1], GONE: []}, position
        assert len(versions.version_names(root)) == 1
        if not faults.struck:
            break
    assert position > 10


def test_a_reader_that_was_opening_it_opens_the_other(two, monkeypatch, tmp_path):
    read, forgotten = versions.read_entry, []

    def slow(*arguments):
        if not forgotten:
            forgotten.append(True)
            forget(two, [GONE])
        return read(*arguments)

    monkeypatch.setattr(rows.versions, "read_entry", slow)
    assert opened(two).version == AGAIN[1]
    forgotten.clear()
    stores.empty(storage.join(two, "locks"))
    mirror(two, str(tmp_path / "mirror"))
    assert opened(str(tmp_path / "mirror")).version == AGAIN[1]


def test_a_mirror_keeps_nothing_that_the_store_took_back(two, tmp_path):
    folder = tmp_path / "mirror"
    rollback(two, FIRST)
    mirror(two, str(folder))
    rollback(two, SECOND)
    mirror(two, str(folder))
    assert len(list((folder / "mirrored").iterdir())) == 2  # the one before, for readers that are opening it
    forget(two, [GONE])
    mirror(two, str(folder))
    assert [made.name[: len(AGAIN[1])] for made in (folder / "mirrored").iterdir()] == [AGAIN[1]]
    assert all(GONE.encode() not in file.read_bytes() for file in folder.rglob("*") if file.is_file())


def test_what_is_not_known_or_in_the_making_is_told(two):
    publishing = Lock(pointers.lock_url(two, "x"), timedelta(minutes=1), "publishing x")
    with publishing, pytest.raises(PublishError, match="held by publishing x"):
        forget(two, [GONE])
    half = storage.join(versions.version_url(two, "half"), "data", "bucket-00000.parquet")
    table = storage.read_table(storage.join(versions.version_url(two, SECOND), "data", "bucket-00000.parquet"))
    storage.write_table(table, half)
    broken = storage.join(versions.version_url(two, FIRST), "manifest.json")
    whole = storage.read_bytes(broken)
    storage.write_bytes(broken, b"{}")
    with pytest.raises(ArtefactError, match="damaged"):
        forget(two, [GONE])
    storage.write_bytes(broken, whole)
    forget(two, [GONE])
    assert holding(two) == []
    with pytest.raises(ArtefactError, match="cannot be searched"):
        file_holds(storage.join(versions.version_url(two, AGAIN[0]), "manifest.json"), [GONE])


def test_a_file_is_searched_as_reading_all_of_it_says(two):
    for name in [name for name in storage.list_files(two) if name.endswith(".parquet")]:
        url = storage.join(two, name)
        with storage.filesystem(url)[0].open(storage.filesystem(url)[1]) as file:
            held = set(parquet.read_table(file)["user_id"].to_pylist())
        for user in [*USERS, "nobody"]:
            assert file_holds(url, [user]) == (user in held)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("user 17 has 200 rows", True),
        ("first user 17, item 4", True),
        ("user '17', later than", True),
        ('{"user_id": "17"}', True),
        ("user 171 has 17 rows", False),
        ("17 rows are past", False),
    ],
)
def test_a_message_that_names_somebody(text, named):
    assert mentions(text, ["17", "x.y"]) == named
