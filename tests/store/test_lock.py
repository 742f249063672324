"""One holder at a time, also when holders die, sleep or are killed between two calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from datetime import timedelta

import pytest

from conrec import storage
from conrec.errors import PublishError
from conrec.store import lock as locks
from conrec.store.lock import Lock, is_abandoned, remove_abandoned

LEASE = timedelta(minutes=1)


@pytest.fixture(params=["memory", "local"])
def url(request, tmp_path):
    return f"memory://{uuid.uuid4().hex}/a.lock" if request.param == "memory" else str(tmp_path / "locks" / "a.lock")


def written(url, **changes):
    """A lock object as another machine's process leaves it."""
    document = {"token": "t", "holder": "another", "host": "far", "machine": "elsewhere", "pid": 7}
    storage.write_json(url, {**document, "taken_at": time.time(), "lease_seconds": 60.0, **changes})


def test_the_lock_is_there_while_it_is_held(url):
    with Lock(url, LEASE, "me") as lock:
        assert storage.exists(url)
        lock.check()
        lock.renew()
        with pytest.raises(PublishError, match=r"held by me \(host .*, process \d+, since 20"), Lock(url, LEASE, "you"):
            pass
        lock.check()
    assert not storage.exists(url)


def test_many_threads_take_turns(url):
    inside, most, turns = [0], [0], [0]

    def work():
        for _ in range(5):
            with Lock(url, LEASE, "me", wait=True):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.001)
                turns[0] += 1
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, turns) == ([1], [20])


def test_a_lock_is_abandoned_when_its_lease_is_over(url):
    written(url, taken_at=time.time() - 30)
    assert not is_abandoned(storage.read_bytes(url))
    assert not remove_abandoned(url)
    with pytest.raises(PublishError, match="held by another"), Lock(url, LEASE, "me"):
        pass
    written(url, taken_at=time.time() - 61)
    with Lock(url, LEASE, "me"):
        pass
    written(url, taken_at=time.time() + 3600)  # a clock that was wrong must not hold it for ever
    assert remove_abandoned(url)
    assert not remove_abandoned(url)


def test_a_renewed_lease_begins_anew(url):
    with Lock(url, LEASE, "me") as lock:
        first = json.loads(storage.read_bytes(url))
        lock.renew()
        second = json.loads(storage.read_bytes(url))
    assert second["taken_at"] > first["taken_at"]
    assert second["token"] == first["token"]


def test_a_lock_that_renews_itself_outlives_its_lease_and_says_since_when_it_is_held(url):
    with Lock(url, timedelta(seconds=0.4), "me") as lock, lock.renewing():
        first = json.loads(storage.read_bytes(url))
        time.sleep(0.6)
        held = storage.read_bytes(url)
        assert not is_abandoned(held) and json.loads(held)["taken_at"] > first["taken_at"]
        assert json.loads(held)["since"] == first["since"]
        with pytest.raises(PublishError, match=r"since 20.*Z, for at most 0 s more than its last sign at 20.*Z\)"):
            Lock(url, LEASE, "you").__enter__()
    time.sleep(0.1)
    assert not storage.exists(url)


def test_what_fails_once_the_lock_is_lost_is_told_as_that(url):
    def work(lost: bool) -> None:
        with Lock(url, LEASE, "me") as lock, lock.renewing():
            if lost:
                written(url)
            raise FileNotFoundError("what the other one took away")

    with pytest.raises(FileNotFoundError):
        work(lost=False)
    with pytest.raises(PublishError, match=r"another .* took over from me") as told:
        work(lost=True)
    assert isinstance(told.value.__context__, FileNotFoundError)


@pytest.mark.long
def test_a_lock_of_a_process_that_ended_is_abandoned_at_once(tmp_path):
    url = str(tmp_path / "a.lock")
    code = (
        "import os, sys; from datetime import timedelta; from conrec.store.lock import Lock; "
        f"Lock({url!r}, timedelta(hours=1), 'killed').__enter__(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert storage.exists(url)
    with Lock(url, LEASE, "me"):
        pass


def test_a_lock_of_a_living_process_is_not_abandoned(url):
    mine = locks._machine()
    written(url, machine=mine, pid=os.getppid())
    assert not is_abandoned(storage.read_bytes(url))
    written(url, machine=mine, pid=os.getpid())  # ours, and nobody here holds it: left by a failure
    assert is_abandoned(storage.read_bytes(url))


def test_who_lost_the_lock_learns_of_it(url):
    with Lock(url, LEASE, "slow") as slow:
        written(url)
        for attempt in (slow.check, slow.renew):
            with pytest.raises(PublishError, match=r"another \(host.* took over from slow"):
                attempt()
    assert storage.exists(url)  # it is the other's: left alone
    storage.remove(url)
    with Lock(url, LEASE, "slow") as slow:
        storage.remove(url)
        with pytest.raises(PublishError, match="another publisher took over from slow"):
            slow.check()


@pytest.mark.parametrize("damaged", [b"", b"{", b"[" * 100_000, b"[]", b'{"token": 1}', b"\xff"])
def test_a_damaged_lock_is_nobodys(url, damaged):
    storage.write_bytes(url, damaged)
    with Lock(url, LEASE, "me"):
        pass
    assert not storage.exists(url)


def test_a_process_id_that_is_none_does_not_signal_a_group(url):
    for pid in (0, -1, 1 << 40):
        written(url, machine=locks._machine(), pid=pid)
        assert is_abandoned(storage.read_bytes(url))


def test_a_lock_that_another_publisher_has_broken_and_taken_is_not_broken(url):
    written(url, taken_at=time.time() - 61)
    stale = storage.read_bytes(url)
    with Lock(url, LEASE, "me") as lock:
        assert not locks._break(url, stale)
        lock.check()
