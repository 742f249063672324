"""Who gained and who lost, between versions of the same and of another number of files."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from conrec.errors import ArtefactError
from conrec.serving.versions import complete_manifest
from conrec.store import pointers
from conrec.store.diff import Affected, Change, diff, diff_user, shared_rows, users_of_bucket
from conrec.store.publish import write_version

NOW = 1_700_000_000_000_000
ABOUT = {"watermark_us": NOW, "generated_users": 1, "failed_users": 0}


@pytest.fixture
def write(tmp_path, blocks_of):
    """Completes a version of (user, item, reason) rows; no audit, no pointer."""

    def version(name, rows, buckets=2):
        common = {"similarity": 1.0, "score": 1.0, "semantic_id": None, "expires_at": NOW}
        items = [dict(zip(("user_id", "item_id", "reason"), row, strict=True)) | common for row in rows]
        manifest = write_version(str(tmp_path), name, blocks_of(items, [], buckets), ABOUT)
        pointers.create_manifest(str(tmp_path), name, manifest)
        return str(tmp_path)

    return version


def random_rows(seed, users=60, items=25):
    rng = np.random.default_rng(seed)
    pairs = {(int(user), int(item)) for user, item in rng.integers((users, items), size=(400, 2))}
    return [(f"user{u}", f"item{i}", str(rng.choice(["predicted", "explicit"]))) for u, i in sorted(pairs)]


@pytest.mark.parametrize(("older", "newer"), [(2, 2), (1, 5), (6, 4), (4, 6), (7, 1)])
def test_equals_plain_sets_whatever_the_buckets(write, older, newer):
    a, b = random_rows(1), random_rows(2)
    write("a", a, older)
    found = diff(write("b", b, newer), "a", "b")
    gained, lost, kept = set(b) - set(a), set(a) - set(b), set(a) & set(b)
    assert kept
    for reason in ("predicted", "explicit"):
        sides = [{row for row in side if row[2] == reason} for side in (gained, lost, kept)]
        users = [len({row[0] for row in side}) for side in sides[:2]]
        assert found.reasons[reason] == Change(*users, *map(len, sides))

    def most(column):
        names = {row[column] for row in gained | lost}
        counts = [Affected(n, sum(r[column] == n for r in gained), sum(r[column] == n for r in lost)) for n in names]
        return sorted(counts, key=lambda one: (-one.gained - one.lost, one.name))[:10]

    assert found.users == most(0)
    assert found.items == most(1)


def test_the_same_version_differs_in_nothing(write):
    found = diff(write("a", random_rows(1)), "a", "a")
    assert {(c.rows_gained, c.rows_lost, c.users_gained) for c in found.reasons.values()} == {(0, 0, 0)}
    assert found.users == found.items == []


def test_from_and_to_nothing(write):
    write("none", [])
    root = write("some", [("a", "x", "explicit"), ("a", "y", "explicit")])
    assert diff(root, "none", "some").reasons == {"explicit": Change(1, 0, 2, 0, 0)}
    assert diff(root, "some", "none").reasons == {"explicit": Change(0, 1, 0, 2, 0)}
    assert diff(root, "none", "none").reasons == {}


def test_a_reason_that_changed_is_lost_and_gained(write):
    write("a", [("ann", "x", "predicted"), ("ann", "y", "predicted")])
    root = write("b", [("ann", "x", "explicit"), ("ann", "y", "predicted")], 3)
    found = diff(root, "a", "b")
    assert found.reasons == {"predicted": Change(0, 1, 0, 1, 1), "explicit": Change(1, 0, 1, 0, 0)}
    gained, lost = diff_user(root, "a", "b", "ann")
    assert [row["reason"] for row in gained.to_pylist()] == ["explicit"]
    assert [row["reason"] for row in lost.to_pylist()] == ["predicted"]
    assert [len(table) for table in diff_user(root, "a", "b", "nobody")] == [0, 0]


def test_rows_are_matched_by_all_three_columns():
    names = ["user_id", "item_id", "reason"]
    a = pa.table([["u", "u", "v"], ["x", "y", "x"], ["p", "p", "p"]], names)
    b = pa.table([["u", "v", "v"], ["x", "y", "x"], ["e", "p", "p"]], names)
    mine, theirs = shared_rows(a, b)
    assert mine.tolist() == [False, False, True]
    assert theirs.tolist() == [False, False, True]


def test_the_users_of_a_bucket_are_read_whole_and_once(write):
    rows = random_rows(3)
    root = write("a", rows, 6)
    manifest, _ = complete_manifest(root, "a")
    for buckets in (1, 4, 6, 9):
        parts = [users_of_bucket(root, manifest, bucket, buckets) for bucket in range(buckets)]
        assert sorted(pa.concat_tables(parts)["user_id"].to_pylist()) == sorted(row[0] for row in rows)
        users = [set(part["user_id"].to_pylist()) for part in parts]
        assert sum(map(len, users)) == len(set.union(*users))


@pytest.mark.parametrize("name", ["absent", "../a", "/etc", "", "a\nb"])
def test_a_version_that_is_not_there(write, name):
    root = write("a", [("ann", "x", "explicit")])
    with pytest.raises(ArtefactError):
        diff(root, "a", name)
    with pytest.raises(ArtefactError):
        diff_user(root, name, "a", "ann")


def test_a_damaged_file_is_named(write, tmp_path):
    root = write("a", [("ann", "x", "explicit")], 1)
    path = tmp_path / "versions" / "a" / "data" / "bucket-00000.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtefactError, match="bucket-00000"):
        diff(root, "a", "a")
