"""Across one schema version: readers of this release open what the release before published, and may be rolled back."""

from __future__ import annotations

import json

import numpy as np
import pytest
from nights import ABOUT, NEW, NOW, OLD, USERS, content, opened

from conrec import storage
from conrec.errors import ArtefactError
from conrec.serving import versions
from conrec.serving.mirror import mirror
from conrec.serving.rules_reader import RulesReader
from conrec.store.diff import diff
from conrec.store.publish import rollback, verify


def as_before(root, version, schema_version=2):
    """Makes a version what the release before would have published: theta for threshold in rules, and its manifest."""
    folder = versions.version_url(root, version)
    manifest = json.loads(storage.read_bytes(storage.join(folder, "manifest.json")))
    for entry in manifest["files"]:
        url = storage.join(folder, entry["path"])
        if entry["path"].startswith("rules/"):
            table = storage.read_table(url)
            storage.write_table(table.rename_columns({"threshold": "theta"}), url)
            entry |= {"bytes": storage.size(url), "sha256": storage.sha256(url)}
    url = storage.join(folder, "manifest.json")
    storage.write_json(url, manifest | {"schema_version": schema_version})
    document = versions.read_pointer(root)
    storage.write_json(versions.pointer_url(root), document | {"manifest_sha256": storage.sha256(url)})


@pytest.fixture
def older(tmp_path, night, codebook_url):
    """A store whose only version is of the schema before."""
    root = str(tmp_path / "blocklists")
    night(root, "v1", 1, ABOUT | {"codebook": storage.sha256(codebook_url)})
    as_before(root, "v1")
    return root


def blocked_by_rules(root, codebook_url):
    reader = RulesReader(root, codebook_url, clock=opened(root)._clock)
    return {user: reader.match(user, semantic_ids=np.array([[1, 1], [0, 0]])).tolist() for user in USERS}


def test_an_upgrade_and_the_way_back(older, night, codebook_url, tmp_path):
    folder = str(tmp_path / "mirror")
    reader = opened(older)  # 1. Readers and mirrors first,
    mirror(older, folder)
    assert content(older) == content(folder) == OLD
    rules = blocked_by_rules(older, codebook_url)
    assert rules == blocked_by_rules(folder, codebook_url)
    assert rules["user0"] == [True, False]
    verify(older, "v1")

    about = {**ABOUT, "watermark_us": NOW + 1, "codebook": storage.sha256(codebook_url)}
    night(older, "v2", 2, about)  # 2. publishers next, held against the version before,
    assert reader.refresh()
    assert mirror(older, folder)
    assert content(older) == content(folder) == NEW
    assert blocked_by_rules(folder, codebook_url) == rules
    assert diff(older, "v1", "v2").reasons["explicit"].rows_gained == len(USERS)

    rollback(older, "v1")  # 3. and the lists go back across the schema.
    assert reader.refresh()
    assert mirror(older, folder)
    assert content(older) == content(folder) == OLD


def test_a_publisher_of_the_older_release_publishes_over_the_newer_one(tmp_path, night):
    root = str(tmp_path / "blocklists")
    night(root, "v0", 2, {**ABOUT, "watermark_us": NOW - 1})
    night(root, "v1", 1)
    as_before(root, "v1", versions.SCHEMA_VERSION + 1)
    with pytest.raises(ArtefactError, match="install a newer conrec"):
        opened(root)
    night(root, "v2", 2, {**ABOUT, "watermark_us": NOW + 1})
    assert content(root) == NEW
    assert versions.read_pointer(root)["previous"] == "v1"


def test_a_schema_has_its_own_names_only(tmp_path, night, codebook_url):
    root = str(tmp_path / "blocklists")
    night(root, "v1", 1, ABOUT | {"codebook": storage.sha256(codebook_url)})
    as_before(root, "v1", versions.SCHEMA_VERSION)
    with pytest.raises(ArtefactError, match="threshold"):
        RulesReader(root, codebook_url)


def test_every_schema_that_is_read_is_one(older):
    url = storage.join(versions.version_url(older, "v1"), "manifest.json")
    manifest = json.loads(storage.read_bytes(url))
    for schema_version in range(versions.SCHEMA_VERSION + 2):
        storage.write_json(url, manifest | {"schema_version": schema_version})
        if versions.OLDEST_SCHEMA <= schema_version <= versions.SCHEMA_VERSION:
            assert versions.read_manifest(older, "v1") is not None
        else:
            with pytest.raises(ArtefactError, match="this release reads 2 to 3"):
                versions.read_manifest(older, "v1")
