"""Files are whole or absent, the same on a local disk and on a store."""

import os
import threading
import uuid

import pyarrow as pa
import pytest
import stores

from conrec import storage
from conrec.errors import DataError, MissingDependencyError

TABLE = pa.table({"user": ["a", "b"], "count": [1, 2]})


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    return str(tmp_path / "root") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def test_bytes_and_json_come_back(root):
    storage.write_bytes(f"{root}/deep/er/file", b"abc")
    assert storage.read_bytes(f"{root}/deep/er/file") == b"abc"
    storage.write_json(f"{root}/a.json", {"ä": [1, None]})
    assert storage.read_json(f"{root}/a.json") == {"ä": [1, None]}


def test_a_file_is_replaced(root):
    storage.write_bytes(f"{root}/file", b"longer than the new one")
    storage.write_bytes(f"{root}/file", b"new")
    assert storage.read_bytes(f"{root}/file") == b"new"


def test_nan_is_no_json(root):
    with pytest.raises(ValueError, match="JSON"):
        storage.write_json(f"{root}/a.json", float("nan"))
    assert not storage.exists(f"{root}/a.json")


def test_broken_json_is_told_with_its_place(root):
    storage.write_bytes(f"{root}/a.json", b"{")
    with pytest.raises(DataError, match=r"a\.json"):
        storage.read_json(f"{root}/a.json")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "file"
    storage.write_bytes(str(file), b"old")

    def full(*_):
        raise OSError("no space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as broken:
            broken.setattr(os, step, full)
            with pytest.raises(OSError, match="no space"):
                storage.write_bytes(str(file), b"new")
        assert file.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["file"]


def test_others_may_read_what_was_written(tmp_path):
    storage.write_bytes(str(tmp_path / "file"), b"")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_a_table_is_read_from_a_file_or_a_folder_of_many(root):
    storage.write_table(TABLE, f"{root}/table/part-1.parquet")
    storage.write_table(TABLE.slice(0, 1), f"{root}/table/deeper/part-0.parquet")
    storage.write_bytes(f"{root}/table/README.md", b"not a table")
    assert storage.read_table(f"{root}/table/part-1.parquet").equals(TABLE)
    whole = storage.read_table(f"{root}/table")
    assert whole.to_pydict() == {"user": ["a", "a", "b"], "count": [1, 1, 2]}
    assert storage.read_table(f"{root}/table", columns=["count"]).column_names == ["count"]


def test_what_is_no_table_is_told_with_its_place(root):
    with pytest.raises(DataError, match="nowhere: no such file"):
        storage.read_table(f"{root}/nowhere")
    storage.write_bytes(f"{root}/folder/notes.txt", b"text")
    with pytest.raises(DataError, match="holds no"):
        storage.read_table(f"{root}/folder")
    storage.write_bytes(f"{root}/text.parquet", b"text")
    with pytest.raises(DataError, match=r"text\.parquet: not readable as Parquet"):
        storage.read_table(f"{root}/text.parquet")
    storage.write_table(TABLE, f"{root}/table.parquet")
    with pytest.raises(DataError, match="column 'item' is missing; the columns are user, count"):
        storage.read_table(f"{root}/table.parquet", columns=["item"])


def test_files_are_listed_by_name_and_hidden_ones_left_out(root):
    for name in ("b", "a/c", ".hidden", "a/.partial", ".folder/d"):
        storage.write_bytes(f"{root}/{name}", b"")
    assert storage.list_files(root) == ["a/c", "b"]


def test_the_digest_of_a_folder_changes_with_content_and_with_names(root):
    storage.write_bytes(f"{root}/x/a", b"1")
    storage.write_bytes(f"{root}/y/a", b"1")
    storage.write_bytes(f"{root}/z/b", b"1")
    assert storage.sha256(f"{root}/x") == storage.sha256(f"{root}/y")
    assert storage.sha256(f"{root}/x") != storage.sha256(f"{root}/z")
    storage.write_bytes(f"{root}/y/a", b"2")
    assert storage.sha256(f"{root}/x") != storage.sha256(f"{root}/y")
    assert storage.sha256(f"{root}/x/a") == "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
    with pytest.raises(DataError, match="no such"):
        storage.sha256(f"{root}/none")


def test_folders_go_up_and_come_down(root, tmp_path):
    (tmp_path / "from" / "deep").mkdir(parents=True)
    (tmp_path / "from" / "deep" / "file").write_bytes(b"1")
    storage.upload(tmp_path / "from", f"{root}/copy")
    assert storage.list_files(f"{root}/copy") == ["deep/file"]
    storage.download(f"{root}/copy", tmp_path / "to")
    assert (tmp_path / "to" / "deep" / "file").read_bytes() == b"1"
    with storage.local_folder(f"{root}/copy") as folder:
        assert (folder / "deep" / "file").read_bytes() == b"1"
    storage.remove(f"{root}/copy")
    storage.remove(f"{root}/copy")
    assert not storage.exists(f"{root}/copy")


@pytest.mark.parametrize(
    ("url", "parts", "joined"),
    [
        ("out", ("a", "b"), "out/a/b"),
        ("out/", ("/a/",), "out/a"),
        ("/", ("a",), "/a"),
        ("s3://bucket/", ("a", "b.json"), "s3://bucket/a/b.json"),
        ("memory://", ("a",), "memory://a"),
        ("out", (), "out"),
    ],
)
def test_urls_are_joined_with_one_slash(url, parts, joined):
    assert storage.join(url, *parts) == joined


def test_a_relative_path_is_made_absolute_and_a_url_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("out") == str(tmp_path / "out")
    assert storage.absolute("s3://bucket/out") == "s3://bucket/out"


def test_an_unknown_protocol_and_a_missing_driver_are_told_apart():
    with pytest.raises(DataError, match="s3://bucket"):
        storage.filesystem("nonsense://place")
    with pytest.raises(MissingDependencyError, match="install"):
        storage.filesystem("gs://bucket/out")


def test_of_many_writers_one_creates_a_file(root):
    for attempt in range(20):
        barrier, ends = threading.Barrier(4), []

        def create(number, url=f"{root}/file{attempt}", barrier=barrier, ends=ends):
            barrier.wait()
            try:
                storage.create_bytes(url, b"x" * number)
                ends.append(number)
            except FileExistsError:
                pass

        threads = [threading.Thread(target=create, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(ends) == 1
        assert storage.read_bytes(f"{root}/file{attempt}") == b"x" * ends[0]
    assert len(storage.filesystem(root)[0].find(storage.filesystem(root)[1])) == 20  # no partial file is left


def test_s3_replaces_a_file_only_while_it_is_what_was_read(tmp_path):
    with stores.s3_server():
        url = f"s3://{stores.BUCKET}/pointer"
        nothing = storage.snapshot(url)
        assert nothing == storage.Snapshot(url, None, None)
        assert storage.replace_unchanged(nothing, b"1")
        assert not storage.replace_unchanged(nothing, b"2")
        first = storage.snapshot(url)
        assert first.data == b"1"
        assert storage.replace_unchanged(first, b"3")
        assert not storage.replace_unchanged(first, b"4")
        assert storage.read_bytes(url) == b"3"
        third = storage.snapshot(url)
        storage.remove(url)
        assert not storage.replace_unchanged(third, b"5")
        assert not storage.exists(url)
        storage.create_bytes(url, b"6")
        with pytest.raises(FileExistsError):
            storage.create_bytes(url, b"7")
        assert storage.has_conditional_put(url)
        assert not storage.has_conditional_put(str(tmp_path))
