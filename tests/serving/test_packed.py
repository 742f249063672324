"""A mirror that downloads what the publisher compiled is, to the byte, the one that compiles by itself."""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa
import pytest
from nights import ABOUT, NEW, NOW, OLD, content, opened

from conrec import storage
from conrec.errors import ArtefactError
from conrec.serving import versions
from conrec.serving.mirror import mirror, read_index, read_state
from conrec.serving.reader import BlocklistReader
from conrec.store import compiled, pointers
from conrec.store.forget import forget
from conrec.store.publish import verified, verify
from conrec.store.served import remove_damaged, unserved


def rows(count):
    """Three rows a user, ids of several lengths and languages, of both reasons, some of which fade."""
    draw = np.random.default_rng(count)
    return [
        {
            "user_id": f"ü{number}" * (1 + number % 3),
            "item_id": f"item{item}" + "é" * (item % 2),
            "reason": ("predicted", "explicit")[item % 2],
            "similarity": draw.random(),
            "score": draw.random(),
            "semantic_id": None if item % 2 else f"<a_{item}>",
            "demotes_at": NOW + number,
            "expires_at": NOW + number + item % 3,
        }
        for number in range(count)
        for item in draw.permutation(9)[:3].tolist()
    ]


def mirrored(folder):
    """Manifest of the mirror, its entries, and the bytes of every array."""
    state = read_state(folder)
    index = read_index(folder, state)
    place = folder / "mirrored" / state["folder"]
    named = {entry["file"] for entries in index["shapes"].values() for entry in entries.values()}
    assert {path.name for path in place.iterdir()} == named | {"index.json"}
    return index["manifest"], index["shapes"], {name: (place / name).read_bytes() for name in sorted(named)}


def without_compiled(root, version, **changed):
    """Takes `compiled` out of a manifest, or changes it, and points at the version anew."""
    url = storage.join(versions.version_url(root, version), "manifest.json")
    manifest = storage.read_json(url)
    told = manifest.pop("compiled")
    storage.write_json(url, manifest | ({"compiled": told | changed} if changed else {}))
    document = versions.read_pointer(root)
    storage.write_json(versions.pointer_url(root), document | {"manifest_sha256": storage.sha256(url)})


@pytest.mark.parametrize(("users", "buckets"), [(0, 1), (1, 4), (200, 3)])
def test_what_is_downloaded_is_what_would_be_compiled(tmp_path, publish_unaudited, caplog, users, buckets):
    root = publish_unaudited(str(tmp_path / "store"), rows(users), version="v1", buckets=buckets, compiled=True)
    verify(root)
    assert mirror(root, str(tmp_path / "downloaded"))
    assert caplog.records == []
    without_compiled(root, "v1")
    assert mirror(root, str(tmp_path / "compiled"))
    downloaded, here = (mirrored(tmp_path / name) for name in ("downloaded", "compiled"))
    assert downloaded[0].pop("compiled")["shapes"] == downloaded[1]
    assert downloaded == here
    readers = [BlocklistReader(str(tmp_path / name)) for name in ("downloaded", "compiled")]
    assert all(readers[0].blocklist(row["user_id"]) == readers[1].blocklist(row["user_id"]) for row in rows(users)[:30])


@pytest.fixture
def published(tmp_path, night):
    root = str(tmp_path / "store")
    night(root, "v1", 1)
    return root


def test_a_night_is_mirrored_without_reading_its_rows(published, tmp_path):
    for name in storage.list_files(versions.version_url(published, "v1")):
        if name.endswith(".parquet"):
            storage.remove(storage.join(versions.version_url(published, "v1"), name))
    mirror(published, str(tmp_path / "mirror"))
    assert content(str(tmp_path / "mirror")) == OLD


def test_a_version_of_an_older_release_is_compiled_where_it_is_mirrored_and_says_so(published, night, tmp_path, caplog):
    folder = str(tmp_path / "mirror")
    with caplog.at_level(logging.WARNING):
        without_compiled(published, "v1")
        mirror(published, folder)
        assert content(folder) == OLD
        night(published, "v2", 2, ABOUT | {"watermark_us": NOW + 1})
        without_compiled(published, "v2", format=99, shapes="of another release")
        mirror(published, folder)
        assert content(folder) == NEW
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
        f"version {version} has no compiled form of format 3: compiled here" for version in ("v1", "v2")
    ]


@pytest.mark.parametrize("damage", ["flip", "truncate", "gone"])
def test_a_damaged_file_is_an_error_and_never_compiled_over(published, night, tmp_path, damage):
    folder = str(tmp_path / "mirror")
    mirror(published, folder)
    night(published, "v2", 2, ABOUT | {"watermark_us": NOW + 1})
    url = versions.compiled_url(published, "v2")
    whole = storage.read_bytes(url)
    if damage == "gone":
        storage.remove(url)
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        storage.write_bytes(url, {"flip": flipped, "truncate": whole[:-1]}[damage])
    for attempt in (
        lambda: mirror(published, folder),
        lambda: verify(published),
        lambda: night(published, "v2", 2, ABOUT | {"watermark_us": NOW + 1}),
    ):
        with pytest.raises(ArtefactError, match=r"compiled\.zst: damaged"):
            attempt()
    assert content(folder) == OLD
    # A night that serving cannot have is published again.
    assert "compiled.zst" in unserved(published, "v2")
    remove_damaged(published, "v2")
    night(published, "v2", 2, ABOUT | {"watermark_us": NOW + 1})
    mirror(published, folder)
    assert content(folder) == NEW


@pytest.mark.parametrize(
    "changed", [{"file": "../../x"}, {"file": "rules.users"}, {"type": "|O"}, {"bytes": -1}, {"bytes": 8}, {"more": 1}]
)
def test_a_manifest_that_names_other_arrays_is_refused(published, tmp_path, changed):
    shapes = versions.read_manifest(published, "v1")[0]["compiled"]["shapes"]
    shapes["data"]["users"] |= changed
    without_compiled(published, "v1", shapes=shapes)
    with pytest.raises(ArtefactError, match=r"compiled\.zst: damaged"):
        mirror(published, str(tmp_path / "mirror"))
    assert list((tmp_path / "mirror" / "mirrored").iterdir()) == []


def unpacked(root, version):
    with pa.OSFile(versions.compiled_url(root, version), "rb") as file:
        return pa.CompressedInputStream(file, "zstd").read()


def test_whoever_is_forgotten_is_not_in_what_is_downloaded(published, tmp_path):
    assert b"user1" in unpacked(published, "v1")
    ((_, other),) = forget(published, ["user1"]).items()
    assert b"user1" not in unpacked(published, other) and b"user2" in unpacked(published, other)
    verified(published, other)
    mirror(published, str(tmp_path / "mirror"))
    assert content(str(tmp_path / "mirror"))[1] == content(published)[1]
    assert opened(str(tmp_path / "mirror")).blocklist("user1") == []
    # What a removal that was killed left behind holds them as well.
    storage.write_bytes(versions.compiled_url(published, "half"), b"user1")
    forget(published, ["user1"])
    assert versions.version_names(published) == [other]


def test_an_older_version_stays_without_when_somebody_is_forgotten(published):
    without_compiled(published, "v1")
    ((_, other),) = forget(published, ["user1"]).items()
    assert "compiled" not in versions.read_manifest(published, other)[0]
    assert not storage.exists(versions.compiled_url(published, other))


def test_what_an_interrupted_publisher_left_is_written_anew(tmp_path, night):
    root = str(tmp_path / "store")
    storage.write_bytes(versions.compiled_url(root, "v1"), b"half")
    night(root, "v1", 1)
    mirror(root, str(tmp_path / "mirror"))
    assert content(str(tmp_path / "mirror")) == OLD
    assert versions.read_pointer(root)["manifest_sha256"] == pointers.observe(root).document["manifest_sha256"]


def test_a_publisher_that_compiles_for_long_gives_signs_of_life(tmp_path, publish_unaudited, monkeypatch):
    root = publish_unaudited(str(tmp_path / "store"), rows(20), version="v1", buckets=3)
    signs = []
    monkeypatch.setattr(compiled, "SILENCE", -1)
    compiled.with_compiled(root, versions.read_manifest(root, "v1")[0], lambda: signs.append(1))
    assert len(signs) == 2 * 3 + 2
