"""A mirror answers as the store does, and holds one whole version whatever fails."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nights import DAY, NOW, at

from conrec import storage
from conrec.errors import ArtefactError
from conrec.serving import versions
from conrec.serving.mirror import follow, is_mirror, mirror, mirrored_version
from conrec.serving.packed import download
from conrec.serving.reader import BlocklistReader
from conrec.store import pointers

USERS = [f"user{number}" for number in range(20)]


def row(user, item, reason="predicted", days=7.0, fades=0.0):
    return {
        "user_id": user,
        "item_id": item,
        "reason": reason,
        "similarity": 0.5,
        "score": 0.25,
        "semantic_id": "<a_1><b_1>" if reason == "predicted" else None,
        "demotes_at": NOW + round(days * DAY),
        "expires_at": NOW + round((days + fades) * DAY),
    }


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "mirror"


@pytest.fixture
def publish(tmp_path, publish_unaudited):
    """Version v<n> blocks item<n> for all users."""
    return lambda number, **options: publish_unaudited(
        str(tmp_path / "store"),
        [row(user, f"item{number}") for user in USERS],
        version=f"v{number}",
        buckets=1,
        **options,
    )


def shown(folder):
    """The items that a reader of the folder shows to every user, of item1 to item3."""
    reader = BlocklistReader(str(folder), clock=lambda: at(1))
    answers = {tuple(reader.filter(user, ["item1", "item2", "item3"])) for user in USERS}
    assert len(answers) == 1
    return reader.version, answers.pop()


SHOWN = {"v1": ("item2", "item3"), "v2": ("item1", "item3"), "v3": ("item1", "item2")}

NAMES = st.text(st.characters(codec="utf-8"), max_size=4)
ROWS = st.lists(
    st.tuples(
        NAMES, NAMES, st.sampled_from(["explicit", "predicted", "weather"]), st.integers(0, 4), st.integers(0, 4)
    ),
    max_size=30,
)


@pytest.mark.long
@settings(max_examples=15, deadline=None)
@given(ROWS, st.integers(1, 4), st.integers(0, 8), NAMES)
def test_a_mirror_answers_as_its_store(publish_unaudited, rows, buckets, days, stranger):
    with tempfile.TemporaryDirectory() as root:
        publish_unaudited(f"{root}/store", [row(*fields) for fields in rows], buckets=buckets)
        assert mirror(f"{root}/store", f"{root}/mirror") is True
        readers = [BlocklistReader(f"{root}/{place}", clock=lambda: at(days)) for place in ("store", "mirror")]
    items = [*sorted({item for _, item, *_ in rows}), stranger]
    users = [*sorted({user for user, *_ in rows}), stranger]

    def answers(reader):
        said = [[reader.filter(user, items), reader.multipliers(user, items).tolist()] for user in users]
        told = [[reader.explain(user, item) for item in items] + reader.blocklist(user) for user in users]
        batch = reader.filter_batch(users, [items] * len(users))
        return said, told, batch, reader.version, reader.watermark, reader.age(), reader.about

    assert answers(readers[0]) == answers(readers[1])
    # Beside a dictionary, so that both are not wrong together.
    acts = {(user, item) for user, item, reason, days_, _ in rows if reason != "weather" and days_ > days}
    expected = [[item for item in items if (user, item) not in acts] for user in users]
    assert readers[0].filter_batch(users, [items] * len(users)) == expected


def test_the_version_before_is_kept_and_older_ones_go(publish, folder):
    source = publish(1)
    assert not is_mirror(str(folder))
    assert mirror(source, str(folder)) is True
    assert is_mirror(str(folder))
    assert mirror(source, str(folder)) is False
    opened = BlocklistReader(str(folder), clock=lambda: at(1))
    for number in (2, 3):
        publish(number)
        assert mirror(source, str(folder)) is True
        assert shown(folder) == (f"v{number}", SHOWN[f"v{number}"])
    assert sorted(name.name[:2] for name in (folder / "mirrored").iterdir()) == ["v2", "v3"]
    # One who opened a version that is gone has it still, and gets to the new one between requests.
    assert opened.filter("user1", ["item1", "item2"]) == ["item2"]
    assert opened.refresh() is True
    assert opened.refresh() is False
    assert opened.version == "v3" == mirrored_version(str(folder))


def test_what_a_killed_process_left_goes_before_anything_is_downloaded(publish, folder, monkeypatch):
    source = publish(1)
    mirror(source, str(folder))
    publish(2)
    mirror(source, str(folder))
    copies, left = sorted((folder / "mirrored").iterdir()), folder / "mirrored" / "v2-killed"

    def full(*arguments):
        if left.exists():
            raise OSError("No space left on device")
        return download(*arguments)

    monkeypatch.setattr("conrec.serving.mirror.download", full)
    left.mkdir()
    assert mirror(source, str(folder)) is False
    assert sorted((folder / "mirrored").iterdir()) == copies  # the one before is one of them
    left.mkdir()
    publish(3)
    assert mirror(source, str(folder)) is True
    assert sorted(copy.name[:2] for copy in (folder / "mirrored").iterdir()) == ["v2", "v3"]


def test_a_copy_that_the_store_took_back_goes_though_another_one_is_served(publish, folder):
    source = publish(1)
    mirror(source, str(folder))
    publish(2)
    mirror(source, str(folder))
    storage.remove(versions.version_url(source, "v1"))
    assert mirror(source, str(folder)) is False
    assert [copy.name[:2] for copy in (folder / "mirrored").iterdir()] == ["v2"]
    assert shown(folder) == ("v2", SHOWN["v2"])


def test_a_rollback_is_followed(publish, folder):
    source = publish(1)
    first = versions.read_pointer(source)
    publish(2)
    mirror(source, str(folder))
    pointers.swap_pointer(pointers.observe(source), "v1", first["manifest_sha256"])
    assert mirror(source, str(folder)) is True
    assert shown(folder) == ("v1", SHOWN["v1"])


def test_a_store_behind_any_protocol(publish, folder, publish_unaudited):
    root = "memory://mirrored-store"
    try:
        publish_unaudited(root, [row(user, "item2") for user in USERS], version="v2")
        mirror(root, str(folder))
        assert shown(folder) == ("v2", SHOWN["v2"])
    finally:
        fsspec.filesystem("memory").rm("/mirrored-store", recursive=True)


def test_a_folder_follows_one_pointer(publish, folder):
    source = publish(1)
    publish(2, pointer="shadow")
    mirror(source, str(folder), "shadow")
    assert BlocklistReader(str(folder), "shadow").version == "v2"
    with pytest.raises(ArtefactError, match="mirrors the pointer shadow; name another folder for current"):
        mirror(source, str(folder))
    with pytest.raises(ArtefactError, match="mirrors the pointer shadow, not current"):
        BlocklistReader(str(folder))


def test_a_folder_follows_one_store(publish, folder, tmp_path, monkeypatch):
    source = publish(1)
    mirror(source, str(folder))
    shutil.copytree(source, tmp_path / "other")
    publish(2)
    with pytest.raises(ArtefactError, match=f"mirrors {source}; name another folder for {tmp_path}/other, or delete"):
        mirror(str(tmp_path / "other"), str(folder))
    assert shown(folder) == ("v1", SHOWN["v1"])
    monkeypatch.chdir(tmp_path)
    assert mirror("store/", str(folder)) is True  # the same place in other words
    publish(3)
    monkeypatch.chdir("/")
    assert mirror(source, str(folder)) is True


def test_a_mirror_has_no_named_version_but_its_own(publish, folder):
    source = publish(1)
    mirror(source, str(folder))
    opened = BlocklistReader(str(folder), "shadow", version="v1")
    publish(2)
    mirror(source, str(folder))
    assert (opened.refresh(), opened.version) == (False, "v1")
    with pytest.raises(ArtefactError, match=f"mirrors version v2, not v1; open that one from {source}"):
        BlocklistReader(str(folder), version="v1")


def test_places_that_are_no_mirror(publish, folder):
    source = publish(1)
    with pytest.raises(ArtefactError, match="is itself a published store"):
        mirror(source, source)
    assert shown(source) == ("v1", SHOWN["v1"])
    with pytest.raises(ArtefactError, match="name a local folder"):
        mirror(source, "memory://mirror")
    with pytest.raises(ArtefactError, match="nothing is published"):
        mirror(str(folder / "nothing"), str(folder))
    with pytest.raises(ArtefactError, match="nothing is published"):
        BlocklistReader(str(folder))


@pytest.mark.long
def test_the_command_goes_on_following_and_outlives_its_store(publish, folder, tmp_path):
    publish(1)
    command = [sys.executable, "-m", "conrec.cli", "mirror", tmp_path / "store", folder, "--every", "1"]
    told = (tmp_path / "told").open("w")
    with subprocess.Popen(command, stdout=told, stderr=subprocess.STDOUT) as following:
        try:
            wait_for(lambda: is_mirror(str(folder)))
            assert shown(folder) == ("v1", SHOWN["v1"])
            (tmp_path / "store").rename(tmp_path / "away")
            wait_for(lambda: "nothing is published" in (tmp_path / "told").read_text().replace("\n", " "))
            assert shown(folder) == ("v1", SHOWN["v1"])
            (tmp_path / "away").rename(tmp_path / "store")
            publish(2)
            wait_for(lambda: mirrored_version(str(folder)) == "v2")
            assert following.poll() is None
        finally:
            following.kill()
    assert shown(folder) == ("v2", SHOWN["v2"])


def test_a_mirror_that_goes_on_makes_a_deleted_folder_anew(publish, tmp_path, monkeypatch):
    source, said = publish(1), []
    monkeypatch.setenv("HOME", str(tmp_path))
    rounds = iter([lambda: shutil.rmtree(tmp_path / "mirror"), lambda: None])
    monkeypatch.setattr("conrec.serving.mirror.time.sleep", lambda _: next(rounds)())
    with pytest.raises(StopIteration):
        follow(source, "~/mirror", "current", None, 60, said.append)
    assert said == ["~/mirror: now v1"] * 2  # nothing in the third round
    assert shown(tmp_path / "mirror") == ("v1", SHOWN["v1"])


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_mirror_in_the_home_folder(publish, tmp_path, monkeypatch):
    source = publish(1)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert mirror(source, "~/mirror") is True
    assert mirrored_version("~/mirror") == BlocklistReader("~/mirror").version == "v1"
    assert (tmp_path / "home" / "mirror" / "MIRROR.json").exists() and not (tmp_path / "~").exists()


def test_a_second_process_is_told(publish, folder):
    source = publish(1)
    mirror(source, str(folder))
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ArtefactError, match="another process mirrors into this folder"):
            mirror(source, str(folder))


def test_a_damaged_store_leaves_the_mirror_as_it_was(publish, folder):
    source = publish(1)
    mirror(source, str(folder))
    before = sorted((folder / "mirrored").iterdir())
    publish(2)
    for name in storage.list_files(storage.join(source, "versions", "v2")):
        url = storage.join(source, "versions", "v2", name)
        whole = storage.read_bytes(url)
        for damaged in (whole[:-1], whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]):
            storage.write_bytes(url, damaged)
            with pytest.raises(ArtefactError, match="damaged"):
                mirror(source, str(folder))
            assert shown(folder) == ("v1", SHOWN["v1"])
            assert sorted((folder / "mirrored").iterdir()) == before
        storage.write_bytes(url, whole)
    assert mirror(source, str(folder)) is True
    assert shown(folder) == ("v2", SHOWN["v2"])


def mirrored_files(folder, shapes=("data", "index")):
    (version,) = (folder / "mirrored").glob("v2-*")
    return [path for path in sorted(version.iterdir()) if path.name.startswith(shapes)] + [folder / "MIRROR.json"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "gone"])
def test_a_damaged_mirror_is_an_error_the_last_good_version_stays_and_mirroring_mends_it(publish, folder, damage):
    source = publish(1)
    mirror(source, str(folder))
    reader = BlocklistReader(str(folder), clock=lambda: at(1))
    publish(2)
    mirror(source, str(folder))
    for path in mirrored_files(folder):
        whole = path.read_bytes()
        if not whole:
            continue
        middle = len(whole) // 2
        if damage == "gone":
            path.unlink()
        else:
            flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
            path.write_bytes({"flip": flipped, "truncate": whole[:-1], "empty": b""}[damage])
        if damage in ("flip", "truncate") and path.name == "MIRROR.json":
            path.write_bytes(whole)  # a letter of the time or a last newline means nothing; other tests damage it
            continue
        with pytest.raises(ArtefactError, match=r"damaged|nothing is published"):
            BlocklistReader(str(folder))
        with pytest.raises(ArtefactError, match=r"damaged|nothing is published"):
            reader.refresh()
        assert reader.filter("user1", ["item1", "item2"]) == ["item2"]
        path.write_bytes(whole)
    path = mirrored_files(folder)[0]
    path.write_bytes(path.read_bytes()[:-1])
    assert mirror(source, str(folder)) is False
    assert shown(folder) == ("v2", SHOWN["v2"])


@pytest.mark.long
def test_every_byte_of_the_state_matters_or_means_nothing(publish, folder):
    """A changed byte is refused, or the reader opens the very version."""
    source = publish(1)
    mirror(source, str(folder))
    path = folder / "MIRROR.json"
    whole = path.read_bytes()
    refused = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert shown(folder)[1] == SHOWN["v1"]
        except ArtefactError:
            refused += 1
    assert refused > len(whole) // 2


@pytest.mark.parametrize("name", ["../store", "/etc", "..", "", "a/b"])
def test_a_state_that_leads_elsewhere_is_refused(publish, folder, name):
    source = publish(1)
    mirror(source, str(folder))
    state = storage.read_json(str(folder / "MIRROR.json"))
    storage.write_json(str(folder / "MIRROR.json"), {**state, "folder": name})
    with pytest.raises(ArtefactError, match="is no folder of a mirror"):
        BlocklistReader(str(folder))


def test_a_full_disk_leaves_the_mirror_as_it_was(publish, folder, publish_unaudited):
    source = publish(1)
    mirror(source, str(folder))
    publish_unaudited(source, [row(f"user{n}", f"item{n}") for n in range(3000)], version="v2")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # as a disk does: a write fails in the midst of a file
    try:
        with pytest.raises(ArtefactError, match="not mirrored"):
            mirror(source, str(folder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert shown(folder) == ("v1", SHOWN["v1"])
    assert [path.name[:2] for path in (folder / "mirrored").iterdir()] == ["v1"]


REPLACE = os.replace


class Died(BaseException):
    pass


@pytest.mark.long
def test_whenever_the_process_dies_the_mirror_is_whole_and_the_next_run_converges(publish, folder, tmp_path):
    source = publish(1)
    mirror(source, str(folder))
    publish(2)
    shutil.copytree(folder, tmp_path / "before")
    deaths, survived = 0, False
    while not survived:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "before", folder)
        counted = iter(range(deaths))

        def die(*_, counted=counted):
            if next(counted, None) is None:
                raise Died

        with pytest.MonkeyPatch.context() as patch:
            # Every file that is finished, and the flip, pass fsync or replace; one who died cleans up nothing.
            patch.setattr(os, "fsync", die)
            patch.setattr(os, "replace", lambda *paths, die=die: (REPLACE(*paths), die()))
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            try:
                mirror(source, str(folder))
                survived = True
            except Died:
                deaths += 1
        assert shown(folder)[1] == SHOWN[shown(folder)[0]]
        mirror(source, str(folder))
        assert shown(folder) == ("v2", SHOWN["v2"])
        publish_again = sorted(path.name[:2] for path in (folder / "mirrored").iterdir())
        assert set(publish_again) <= {"v1", "v2"} and len(publish_again) <= 3
    assert deaths > 20


@pytest.mark.long
def test_readers_open_and_refresh_while_versions_flip(publish, folder):
    source = publish(1)
    named = {1: versions.read_pointer(source)}
    for number in (2, 3):
        publish(number)
        named[number] = versions.read_pointer(source)
    mirror(source, str(folder))
    stop, wrong, opened = threading.Event(), [], [0, 0]

    def look(thread):
        reader = BlocklistReader(str(folder), clock=lambda: at(1))
        while not stop.is_set():
            try:
                if thread:
                    reader.refresh()
                else:
                    reader = BlocklistReader(str(folder), clock=lambda: at(1))
                batch = reader.filter_batch(USERS, [["item1", "item2", "item3"]] * len(USERS))
                opened[thread] += 1
                if batch not in [[list(left)] * len(USERS) for left in SHOWN.values()]:
                    wrong.append(batch)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=look, args=(thread,)) for thread in (0, 1)]
    for thread in threads:
        thread.start()
    for flip in range(20):
        number = flip % 3 + 1
        pointers.swap_pointer(pointers.observe(source), f"v{number}", named[number]["manifest_sha256"])
        mirror(source, str(folder))
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert min(opened) > 10
