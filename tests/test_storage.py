"""Files are whole or absent, the same on a local disk and on a store."""

import contextlib
import errno
import multiprocessing
import os
import signal
import socket
import threading
import uuid

import fsspec
import pyarrow as pa
import pytest
import stores
from fsspec.implementations.memory import MemoryFileSystem

from conrec import storage
from conrec.errors import ConrecError, DataError, MissingDependencyError, StorageError
from conrec.store_errors import names_store

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


def test_the_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("~/out") == str(tmp_path / "home" / "out")
    storage.write_bytes("~/out/file", b"1")
    assert (tmp_path / "home" / "out" / "file").read_bytes() == b"1"
    assert os.listdir(tmp_path) == ["home"]


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("s3:/bucket/a", "write s3://bucket/a"),
        ("s3:bucket", "write s3://bucket"),
        ("s3//bucket", "write s3://bucket"),
        ("gs:/bucket", "write gs://bucket"),
        ("file:/data/a", "write /data/a or file:///data/a"),
        ("", "'' is no place; write a folder or a URL"),
    ],
)
def test_a_protocol_that_lacks_a_slash_is_refused_as_is_an_empty_text(typo, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for operation in (storage.exists, storage.absolute, storage.sha256, lambda url: storage.write_bytes(url, b"")):
        with pytest.raises(DataError, match=meant):
            operation(typo)
    assert not os.listdir(tmp_path)


def test_names_with_a_colon_that_are_no_protocol_stay_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("night:1/a", "./s3:/a", "s3/a", "file", "data//a"):
        storage.write_bytes(name, b"1")
        assert (tmp_path / name).read_bytes() == b"1"


def test_a_chain_of_protocols_is_a_url():
    storage.write_bytes("memory://chained/a", b"1")
    assert storage.read_bytes("simplecache::memory://chained/a") == b"1"
    for chain in ("zip::memory://chained/a.zip", "zip://a::memory://chained/a.zip", "tar::/data/a.tar"):
        with pytest.raises(DataError, match="is not read; unpack it, and name the folder"):
            storage.exists(chain)


OPERATIONS = {
    "exists": storage.exists,
    "read": storage.read_bytes,
    "write": lambda url: storage.write_bytes(url, b"1"),
    "create": lambda url: storage.create_bytes(url, b"1"),
    "list": storage.list_files,
    "digest": storage.sha256,
    "table": storage.read_table,
    "snapshot": storage.snapshot,
    "replace": lambda url: storage.replace_unchanged(storage.Snapshot(url, b"1", "tag"), b"2"),
    "remove": storage.remove,
}


@pytest.fixture
def amazon():
    with stores.amazon_without_credentials() as patch:
        yield patch


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_store_without_credentials_is_told(operation, amazon):
    with pytest.raises(StorageError, match=r"s3://bucket/a: no credentials: .*AWS_ACCESS_KEY_ID"):
        OPERATIONS[operation]("s3://bucket/a")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_store_out_of_reach_is_told(operation, amazon):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can answer there
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "a"),
            ("AWS_SECRET_ACCESS_KEY", "b"),
            ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}"),
        ):
            amazon.setenv(name, value)
        with pytest.raises(StorageError, match=r"s3://bucket/a: the store is out of reach: .*AWS_ENDPOINT_URL"):
            OPERATIONS[operation]("s3://bucket/a")


def test_other_stores_out_of_reach_and_without_a_driver_are_told():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{closed.getsockname()[1]}/a"
        for protocol in ("http", "ftp"):
            with pytest.raises(StorageError, match=f"{protocol}://{place}: the store is out of reach"):
                storage.sha256(f"{protocol}://{place}")
        with pytest.raises(StorageError, match=f"hdfs://{place}: "):
            storage.exists(f"hdfs://{place}")


@pytest.mark.long
def test_a_refusal_and_a_missing_bucket_are_told_and_a_missing_file_is_none():
    with stores.s3_server():
        with pytest.raises(StorageError, match="s3://nowhere/a: there is no such bucket"):
            storage.write_bytes("s3://nowhere/a", b"1")
        with pytest.raises(FileNotFoundError) as missing:
            storage.read_bytes(f"s3://{stores.BUCKET}/a")
        assert not isinstance(missing.value, ConrecError)

    @names_store
    def refused(url):
        raise PermissionError("Access Denied")  # as s3fs says it: without a number

    with pytest.raises(StorageError, match="s3://bucket/a: the store refuses: Access Denied; the credentials"):
        refused("s3://bucket/a")
    with pytest.raises(PermissionError) as local:
        refused("/data/a")
    assert not isinstance(local.value, ConrecError)


@pytest.fixture
def without_links(monkeypatch):
    """A mount that makes no hard links, as FAT and many network shares."""

    def link(*_, **__):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)


@pytest.mark.usefixtures("without_links")
def test_without_hard_links_one_of_many_writers_creates_a_file(tmp_path):
    test_of_many_writers_one_creates_a_file(str(tmp_path / "root"))


@pytest.mark.usefixtures("without_links")
def test_without_hard_links_a_file_that_comes_and_goes_has_one_creator_at_a_time(tmp_path):
    url, inside, most = str(tmp_path / "lock"), [], []

    def take_turns():
        for _ in range(60):
            with contextlib.suppress(FileExistsError):
                storage.create_bytes(url, b"")
                inside.append(1)
                most.append(len(inside))
                inside.pop()
                os.unlink(url)

    threads = [threading.Thread(target=take_turns) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most and max(most) == 1
    assert not os.listdir(tmp_path)


def create_and_die(url, size, die):
    """A writer that is killed on its way, or as soon as its file is there."""
    os.link = os.symlink = lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOTSUP, "no links"))
    rename = os.rename

    def last(*paths):
        if die == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*paths)
        os.kill(os.getpid(), signal.SIGKILL)

    os.rename = last
    storage.create_bytes(url, b"x" * size)


@pytest.mark.long
@pytest.mark.parametrize("die", ["before", "after"])
@pytest.mark.usefixtures("without_links")
def test_without_hard_links_a_killed_writer_leaves_a_whole_file_or_none(die, tmp_path):
    url = str(tmp_path / "file")
    writer = multiprocessing.get_context("fork").Process(target=create_and_die, args=(url, 100, die))
    writer.start()
    writer.join(60)
    assert writer.exitcode == -signal.SIGKILL
    if die == "before":
        assert not storage.exists(url)
        storage.create_bytes(url, b"second")  # at once: what the dead one held is nobody's
        assert storage.read_bytes(url) == b"second"
    else:
        assert storage.read_bytes(url) == b"x" * 100
        with pytest.raises(FileExistsError):
            storage.create_bytes(url, b"second")
    assert storage.list_files(str(tmp_path)) == ["file"]


def test_a_store_that_can_publish_is_found_out_without_a_trace(root, without_links):
    storage.require_creation(root)
    assert not storage.filesystem(root)[0].find(storage.filesystem(root)[1])


def test_a_store_that_takes_nothing_or_creates_over_a_file_is_refused(tmp_path):
    root = f"faultyfile://{tmp_path}/root"
    with stores.failing(root, stores.read_only()), pytest.raises(StorageError, match="Read-only file system"):
        storage.require_creation(root)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/root: nothing can be published here: .*Not a directory"):
        storage.require_creation(str(tmp_path / "file" / "root"))

    class Careless(MemoryFileSystem):
        protocol = "careless"

        def pipe_file(self, path, value, mode="overwrite", **kwargs):
            super().pipe_file(path, value)

    fsspec.register_implementation("careless", Careless, clobber=True)
    with pytest.raises(StorageError, match="two publishers would overwrite each other"):
        storage.require_creation("careless://root")
    assert not Careless().find("/root")


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


@pytest.mark.long
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
