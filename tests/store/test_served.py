"""Whether serving has what was published: what a person moved stays, what is gone or damaged is said."""

import pytest
from nights import ABOUT, NEW, NOW, OLD, content

from conrec import storage
from conrec.serving.versions import read_manifest
from conrec.store.publish import rollback
from conrec.store.served import remove_damaged, unserved

DATA = "versions/v2/data/bucket-00001.parquet"


@pytest.fixture
def root(tmp_path, night):
    night(str(tmp_path), "v1", 1, {**ABOUT, "watermark_us": NOW - 1})
    night(str(tmp_path), "v2", 2)
    return str(tmp_path)


def test_what_is_served_or_was_left_for_another_whole_version_lacks_nothing(root):
    assert unserved(root, "v2") is None
    assert unserved(root, "v1") is None, "a later night was published"
    rollback(root, "v1")
    assert unserved(root, "v2") is None and content(root) == OLD
    storage.remove(f"{root}/versions/v1/manifest.json")
    assert "v1" in unserved(root, "v2"), "readers have nothing"


@pytest.mark.parametrize(
    ("place", "data", "told"),
    [
        ("CURRENT.json", None, "CURRENT.json is gone"),
        ("CURRENT.json", b"{", "CURRENT.json: damaged: not JSON"),
        ("versions/v2", None, "v2"),
        ("versions/v2/manifest.json", None, "no complete version"),
        ("versions/v2/manifest.json", b"{}", "manifest.json: damaged"),
        (DATA, None, "the file is missing"),
        (DATA, b"PAR1", "damaged: 4 bytes"),
        ("versions/v2/data/stray.parquet", b"PAR1", "the manifest does not name it"),
    ],
)
def test_what_is_gone_or_damaged_is_named_and_published_again(root, night, place, data, told):
    storage.remove(f"{root}/{place}")
    if data is not None:
        storage.write_bytes(f"{root}/{place}", data)
    assert told in unserved(root, "v2")
    remove_damaged(root, "v2")
    night(root, "v2", 2)
    assert unserved(root, "v2") is None and content(root) == NEW


def test_a_whole_version_is_never_removed(root):
    manifest = read_manifest(root, "v2")
    storage.remove(f"{root}/CURRENT.json")
    remove_damaged(root, "v2")
    assert read_manifest(root, "v2") == manifest and storage.exists(f"{root}/{DATA}")


def test_a_version_of_another_release_is_never_removed(root):
    url = f"{root}/versions/v2/manifest.json"
    storage.write_json(url, storage.read_json(url) | {"schema_version": 99})
    remove_damaged(root, "v2")
    assert storage.exists(url) and storage.exists(f"{root}/{DATA}")
